"""The island store's constants. The specification in words, with MUST and MAY, is docs/store-format.md.

atlas.zarr/                     root group, attributes ROOT_KEYS
  islands/                      data frame: chrom, start, end, genes (index: island name)
  samples/                      group, attribute "index": the committed samples in order of commit
    <sample>/                   AnnData group
      X                         uint8 [n_cells, n_islands], levels 0..5
      obs, var                  data frames; var has the bool column "measured"
      uns/conversion            group, attributes: where the sample came from, and "complete"
"""

FORMAT = "annatac_scale.island_store"
FORMAT_VERSION = "2.0"

N_LEVELS = 5
"""Levels of an open island, 1 to 5; level 0 is closed and never stored."""

BLOCK_CELLS = 250
"""Cells in a block: the inner Zarr chunk, the unit of reading and shuffling."""

SHARD_BLOCKS = 16
"""Blocks in a shard: the Zarr file, the unit of writing."""

SHARD_CELLS = BLOCK_CELLS * SHARD_BLOCKS

ISLANDS = "islands"
SAMPLES = "samples"
CONVERSION = "uns/conversion"
INDEX = "index"

ROOT_KEYS = (
    "format",
    "version",
    "assembly",
    "chromosomes",
    "width_bp",
    "selection",
    "islands_sha256",
    "n_islands",
    "n_levels",
    "counting",
)

COUNTINGS = ("insertion", "fragment", "paired-insertion")

SAMPLE_NAME = "(?!zarr[.]json$)[A-Za-z0-9][A-Za-z0-9_.-]{0,199}"
"""A sample's name becomes a folder name: no separators, never hidden, never relative, not Zarr's own file."""

CODEC = "annatac_scale.open_islands"
ZSTD_LEVEL = 1
"""The island codec leaves little but order-0 entropy: higher zstd levels were measured to gain nothing."""
