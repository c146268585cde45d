from __future__ import annotations

import torch
from apt_template.provider import Template

from apt.testing import conformance

test_conformance = conformance("ffn.template")
test_conformance_of_another_power = conformance("ffn.template", {"power": 1})


def test_with_power_1_it_is_a_relu_network() -> None:
    layer = Template(power=1).create_layer(8, 16)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(layer(x), layer.down(torch.relu(layer.up(x))))


def test_the_gain_follows_its_buffer() -> None:
    layer = Template().create_layer(8, 16)
    x = torch.randn(2, 3, 8)
    once = layer(x)
    layer.gain.fill_(3.0)
    torch.testing.assert_close(layer(x), 3 * once)
