import json

import numpy as np
import pytest

from annatac_scale.errors import InputError
from annatac_scale.stream.loader import BatchStream

OPTIONS = {"global_batch_size": 48, "seed": 5}


@pytest.mark.parametrize("two", [2, 2.0, np.int64(2), np.float32(2)])
def test_a_weight_is_the_same_in_a_state_whatever_kind_of_number_it_is(unequal_store, two):
    state = BatchStream(unequal_store.store, **OPTIONS, weights={"s0": two}).state_dict()
    resumed = BatchStream(unequal_store.store, **OPTIONS, weights={"s0": 2.0})
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert resumed.state_dict() == state


@pytest.mark.parametrize("cells", [[0, 0, 5], [3, 99_999], [-1]])
def test_ids_that_are_not_there_or_come_twice_are_refused_with_a_condition_too(unequal_store, cells):
    for options in ({}, {"where": "sample == 's0'"}):
        with pytest.raises(InputError, match="cell "):
            BatchStream(unequal_store.store, **OPTIONS, cells=np.array(cells), **options)


@pytest.mark.parametrize("given", [[7, 3, 5], [3, 5, 7]])
def test_what_becomes_of_the_ids_that_were_given_does_not_matter(unequal_store, given):
    cells = np.array(given)
    stream = BatchStream(unequal_store.store, **OPTIONS, cells=cells)
    cells[:] = 0
    assert sorted(i for batch in stream for i in batch.cell_ids.tolist()) == [3, 5, 7]
