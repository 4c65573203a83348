"""Tensors that wait in a file without a name."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.disk.shelf import Shelf


@settings(max_examples=50)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 3),
            st.lists(st.integers(0, 5), max_size=3),
            st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_what_was_put_last_under_a_key_comes_back(tmp_path_factory, rows):
    shelf = Shelf(tmp_path_factory.mktemp("shelf"))
    last = {}
    for number, (key, shape, dtype, turned) in enumerate(rows):
        generator = torch.Generator().manual_seed(number)
        tensor = (torch.randn(shape, generator=generator) * 10).to(dtype)
        tensor = tensor.mT if turned and tensor.ndim > 1 else tensor
        shelf.put(key, tensor)
        last[key] = tensor.clone()
        for name, expected in last.items():
            found = shelf.get(name)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)
    assert shelf.get("nothing") is None
    shelf.close()


def test_its_file_has_no_name(tmp_path):
    shelf = Shelf(tmp_path)
    shelf.put(1, torch.ones(1000))
    assert [*tmp_path.iterdir()] == []
    shelf.close()
