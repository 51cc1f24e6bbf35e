"""A Moshi on the meta device is built without drawing values for it."""

from __future__ import annotations

import torch
from torch import nn

from moshi_ttt.hosts.moshi.initial_values import NoInitialValues


def made(device):
    linear, table = nn.Linear(3, 5, device=device), nn.Embedding(4, 2, device=device)
    nn.init.trunc_normal_(linear.weight, std=0.1, a=-0.3, b=0.3)
    nn.init.constant_(linear.bias, 2.0)
    return linear, table


def test_values_and_the_generator_are_as_without_it_where_there_are_values():
    found = []
    for mode in (torch.enable_grad(), NoInitialValues()):
        torch.manual_seed(3)
        with mode:
            linear, table = made("cpu")
        found.append((linear.weight, linear.bias, table.weight, torch.rand(4)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_on_the_meta_device_modules_are_as_ever_and_no_number_is_drawn():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with NoInitialValues():
        linear, table = made("meta")
    assert torch.equal(torch.rand(4), expected)
    assert [tuple(tensor.shape) for tensor in (linear.weight, linear.bias, table.weight)] == [(5, 3), (5,), (4, 2)]
    assert all(isinstance(tensor, nn.Parameter) and tensor.is_meta for tensor in (linear.weight, table.weight))
