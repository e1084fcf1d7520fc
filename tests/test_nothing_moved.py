"""Hashes of configurations and bits of trained weights, recorded once: whoever moves code may not move a number."""
from dataclasses import replace

import pytest
import torch

from symbreak.config import Config
from symbreak.provenance import device_name
from symbreak.train import train

SMALL = dict(train_size=200, test_size=100, epochs=2, width=1, depth=7, batch_size=64)
LEAKY = SMALL | dict(net="LeakyNet", depth=16, init="1_iiii_iiii_iiii")
RUNS = {  # name -> configuration, its hash
    "dropout and augmentation": (Config(**SMALL, dropout=0.01, augment="crop_flip"), "7870d6dc563b"),
    "LeakyNet, one-ulp noise": (Config(**LEAKY, gradient_ulps=1), "3e34a35969e4"),
    "random reduction": (Config(**SMALL, reduction="element", reduction_chunks=3), "1ef224fbfafe"),
    "quotient": (Config(**SMALL, quotient=True, warmup=1), "94c4f939fa21"),
    "input and weight noise": (Config(**SMALL, input_noise=0.1, weight_noise=1e-3), "9c7086faa740"),
    "one ulp in a layer": (Config(**SMALL, ulp_layer="stages.1.0.conv", ulp_step=2), "1b80e6f904d7"),
}
# How a sum is rounded is the business of the kernels, which the maker of the processor, its instructions and the
# release of torch decide. For these: digests of the weights before the first step, after it, and at the end.
BITS = {
    ("AMD", "AVX512", "2.13"): {
        "dropout and augmentation": ("b174f318f6c44448", "9e5de5f94dcef06a", "7b05c4c53f513604"),
        "LeakyNet, one-ulp noise": ("03d015aec631e77f", "fe32ce74903b9333", "6be86c6c7f1a9353"),
        "random reduction": ("b174f318f6c44448", "948f5ccec0f4aec9", "332b6907b97789f0"),
        "quotient": ("e1b99fecc31c3d45", "2703d37d642200dc", "4ca4ad6e8cace26d"),
        "input and weight noise": ("ac07181912731d4d", "e8898cf3522a6146", "b7c01fd8cc276af8"),
        "one ulp in a layer": ("b174f318f6c44448", "948f5ccec0f4aec9", "789ab5081fa4de8a"),
    },
    ("Intel(R)", "AVX512 and AMX", "2.13"): {
        "dropout and augmentation": ("b174f318f6c44448", "9e5de5f94dcef06a", "232bda688f21a1d1"),
        "LeakyNet, one-ulp noise": ("03d015aec631e77f", "fe32ce74903b9333", "ad3e65997c3e4d08"),
        "random reduction": ("b174f318f6c44448", "948f5ccec0f4aec9", "0e98ca34380c5ec3"),
        "quotient": ("e1b99fecc31c3d45", "f35e67ecec5255ac", "191d309300b8654d"),
        "input and weight noise": ("ac07181912731d4d", "e8898cf3522a6146", "103d132cdf862e37"),
        "one ulp in a layer": ("b174f318f6c44448", "948f5ccec0f4aec9", "a635cf4b3c830edf"),
    },
}


def kernels() -> tuple[str, str, str]:
    "What decides how this machine rounds: maker, instructions, release of torch"
    maker = device_name(torch.device("cpu")).split()[0]
    instructions = torch.backends.cpu.get_cpu_capability() + " and AMX" * torch.cpu._is_amx_tile_supported()
    return maker, instructions, ".".join(torch.__version__.split(".")[:2])


@pytest.mark.parametrize("name", RUNS)
def test_hashes_are_what_they_were(name):
    config, expected = RUNS[name]
    assert config.hash == expected


@pytest.mark.parametrize("name", RUNS)
def test_weights_are_what_they_were_to_the_bit(name):
    if kernels() not in BITS:
        pytest.skip(f"bits are recorded for {', '.join(map(str, BITS))}, and this is {kernels()}: other kernels round "
                    "differently")
    run = train(replace(RUNS[name][0], device="cpu"))
    assert tuple(run.record["digests"].values()) == BITS[kernels()][name]
