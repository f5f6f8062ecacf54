"""Device batches against the kernels' decoding, on the CPU: the same tensor operations run on a GPU."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from annatac_scale.store.codec import encode_block
from annatac_scale.store.encoded_rows import EncodedRows
from annatac_scale.store.open_islands import OpenIslands
from annatac_scale.stream.device import decode, to_device
from annatac_scale.stream.loader import BatchStream
from annatac_scale.stream.vocabulary import Vocabulary

WHOLE_GENOME = 650_000

rows_of_cells = st.lists(
    st.one_of(
        st.dictionaries(st.integers(0, WHOLE_GENOME - 1), st.integers(1, 5), max_size=40),
        st.dictionaries(st.integers(0, 120), st.integers(1, 5), max_size=100),
    ),
    max_size=12,
)


@given(rows_of_cells)
def test_tensor_operations_decode_any_rows(rows):
    pairs = [sorted(row.items()) for row in rows]
    flat = np.array([pair for row in pairs for pair in row]).reshape(-1, 2)
    offsets = np.cumsum([0, *map(len, pairs)])
    cells = OpenIslands(offsets, flat[:, 0].astype(np.int32), flat[:, 1].astype(np.uint8))
    data, ends = EncodedRows.of_block(encode_block(cells, len(rows)), len(rows)).packed()
    islands, levels, found = decode(torch.from_numpy(data), torch.from_numpy(ends))
    assert found.tolist() == offsets.tolist()
    assert list(zip(islands.tolist(), levels.tolist(), strict=True)) == [p for row in pairs for p in row]


@pytest.mark.parametrize("with_vocabulary", [False, True])
def test_a_batch_is_the_same_on_a_device_whether_it_was_sent_decoded_or_encoded(
    unequal_store, with_vocabulary
):
    vocabulary = None
    if with_vocabulary:
        kept = np.array([0, 3, 4, 9, 20, 39], np.int32)
        vocabulary = Vocabulary(unequal_store.store.islands_sha256, 40, kept)
    stream = BatchStream(
        unequal_store.store, global_batch_size=300, seed=1, vocabulary=vocabulary, obs=["sample"]
    )
    encoded = list(stream.encoded())
    stream.set_epoch(0)
    for batch, bytes_only in zip(stream, encoded, strict=True):
        for sent in (to_device(batch, "cpu"), to_device(bytes_only, "cpu")):
            assert len(sent) == len(batch)
            assert sent.islands.dtype == torch.int32
            assert sent.levels.dtype == torch.uint8
            for name in ("cell_ids", "offsets", "islands", "levels"):
                np.testing.assert_array_equal(getattr(sent, name).numpy(), getattr(batch, name))
            np.testing.assert_array_equal(sent.obs["sample"].numpy(), batch.obs["sample"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_batch(unequal_store):
    for batch in BatchStream(unequal_store.store, global_batch_size=300, seed=1).encoded():
        here, there = to_device(batch, "cpu"), to_device(batch, "cuda")
        assert there.islands.is_cuda
        assert torch.equal(there.islands.cpu(), here.islands)
        assert torch.equal(there.levels.cpu(), here.levels)
