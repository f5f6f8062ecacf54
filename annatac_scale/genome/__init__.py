"""The genome: assemblies, TSS tables and the island space."""
