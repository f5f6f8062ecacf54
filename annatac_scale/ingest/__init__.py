"""From files to a store: fragments, 10x h5, 10x mtx folders and h5ad, counted over islands by Dask."""
