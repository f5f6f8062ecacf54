"""Island stores: cells x islands on disk as chunked Zarr v3, written once per sample and committed last."""
