"""Cell types of scATAC-seq atlases: convert, pretrain, fine-tune, annotate. One function a command."""
