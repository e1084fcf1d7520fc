"""For any input: an error that names what is wrong with it, or a right answer; and no NaN out of finite numbers."""
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from torch import nn

from symbreak.cache import DataError
from symbreak.config import MAXIMUM, MINIMUM, Config, learning_rate
from symbreak.data import load, stratified
from symbreak.diversity import asymmetry, distinct_features, effective_width, layer_asymmetry, weight_correlation
from symbreak.growth import growth_rate
from symbreak.init import averaging_, delta_orthogonal_, he_, identity_, leaky_normal_, parse_init
from symbreak.nets import ConstNet, LeakyNet, UniqueFeatureMLP, weight_layers
from symbreak.numerics import cpu_threads
from symbreak.prediction import predict, three_copies
from symbreak.propagation import rectified_cosine
from symbreak.quotient import expand, partition, quotient
from symbreak.records import read_lines, read_sealed, sealed, without_nan, write_json, write_lines
from symbreak.symmetry import check
from symbreak.train import train

EPS = 1e-9
finite = st.floats(allow_nan=False, allow_infinity=False)
plain = st.floats(-10, 10).map(lambda value: round(value, 3))


# configurations

HINTS = get_type_hints(Config)
NAMES = [field.name for field in fields(Config)]
SMALL = dict(train_size=64, test_size=32, epochs=1, width=1, depth=7, batch_size=32)
ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 8), st.integers(), st.floats(), st.floats(0, 1), st.text(max_size=6),
    st.sampled_from((10 ** 30, 10 ** 400, "identical", "he", "cpu", "auto", "1_iii", "h_ihi", "stem", [], {}, (1,),
                     b"x")))


def in_range(name):
    """Values that a field allows on its own, as far as its annotation and range say."""
    hint = HINTS[name]
    if get_origin(hint) is Literal: return st.sampled_from(get_args(hint))
    kinds = get_args(hint) or (hint,)
    if bool in kinds: return st.booleans()
    if str in kinds: return st.sampled_from(("identical", "he", "1_iii", "cpu", "stem", "digits", "folder:/x"))
    low, high = MINIMUM.get(name, -1000), MAXIMUM.get(name, 1000)
    number = st.floats(low, high) if float in kinds else st.integers(int(low), int(min(high, 4000)))
    return st.none() | number if type(None) in kinds else number


def changes(values):
    names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)
    return names.flatmap(lambda some: st.fixed_dictionaries({name: values(name) for name in some}))


@st.composite
def configurations(draw):
    try: return Config(**draw(changes(in_range)))
    except ValueError: assume(False)


def trained(some):
    """Whether a configuration trains, to a right answer; else it is refused by the name of a field."""
    try:
        config = Config(**some)
        is_quick = config.epochs <= 2 and config.width <= 9 and config.depth <= 10 and config.threads <= 2
        if not is_quick or config.compile or config.processes > 1: return False  # `tests/test_ranks.py` has processes
        run = train(config)
    except ValueError as e: assert str(e).split(":")[0] in (*NAMES, "source"), (some, e)
    except DataError: assert config.data != "digits"
    else:
        measured = [row for row in run.metrics if "test_accuracy" in row]
        epochs = [row["epoch"] for row in run.metrics]
        assert run.record["status"] == "diverged" or epochs == [*range(config.epochs + 1)]
        assert measured and all(0 <= row["test_accuracy"] <= 1 for row in measured)
        if config.quotient and not config.weight_noise: assert len({row["distinct_features"] for row in measured}) == 1
        return True
    return False


@given(changes(lambda name: st.one_of(ANYTHING, in_range(name))))
@example(dict(data="folder:/x"))
@example(dict(reduction="element", reduction_chunks=9))
@example(dict(net="UniqueFeatureMLP", depth=Config.depth, reduction="atomic", threads=2))
def test_a_configuration_is_refused_by_name_or_trains(some): trained(SMALL | some)


SIZE = st.floats(0, 1e-2)
ANY_NET = dict(  # field -> quick values of it, most of which go together
    train_size=st.integers(40, 64), augment=in_range("augment"), weight_noise=SIZE, gradient_noise=SIZE,
    gradient_ulps=st.integers(0, 2 ** 23), input_noise=st.floats(0, 1), quotient=st.booleans(),
    epochs=st.integers(0, 2), batch_size=st.integers(8, 64), lr=st.floats(0, 0.05), momentum=st.floats(0, 0.9),
    weight_decay=SIZE, schedule=in_range("schedule"), warmup=st.integers(0, 2), device=st.sampled_from(("auto", "cpu")),
    precision=st.sampled_from(("float32", "float64")), deterministic=st.booleans(), channels_last=st.booleans(),
    threads=st.integers(1, 2), allreduce=in_range("allreduce"), seed=in_range("seed"), data_seed=in_range("data_seed"),
    rerun=in_range("rerun"), measure_every=st.integers(1, 3), measure_steps=st.integers(0, 3))
DEEP = ANY_NET | dict(depth=st.sampled_from((7, 10)), dropout=st.floats(0, 0.9), reduction=in_range("reduction"),
                      reduction_chunks=in_range("reduction_chunks"), ulp_layer=st.sampled_from(("stem", "head")),
                      ulp_step=st.integers(0, 3))
OF_NET = dict(
    ConstNet=DEEP | dict(init=st.sampled_from(("identical", "he")), skip=in_range("skip")),
    LeakyNet=DEEP | dict(depth=st.just(7), init=st.sampled_from(("identical", "1_iii", "1_i1i", "h_hih")),
                         slope=st.floats(0.01, 0.5)),
    UniqueFeatureMLP=ANY_NET | dict(depth=st.just(Config.depth), width=st.integers(4, 9), distinct=st.integers(1, 4),
                                    ulp_layer=st.sampled_from(("hidden", "head"))))


@st.composite
def quick(draw):
    """Changes of a network's own fields, half a dozen at a time."""
    net = draw(st.sampled_from(sorted(OF_NET)))
    needed = {"depth", "width"} & set(OF_NET[net])
    names = draw(st.lists(st.sampled_from(sorted(OF_NET[net])), min_size=4, max_size=10, unique=True))
    return dict(SMALL, net=net, device="cpu") | {name: draw(OF_NET[net][name]) for name in {*names, *needed}}


def test_most_configurations_whose_fields_are_in_range_train():
    count = []

    @given(quick())
    def each(some): count.append(trained(some))
    each()
    assert sum(count) >= 0.8 * len(count), f"{sum(count)} of {len(count)}"


@given(configurations())
def test_a_configuration_survives_json_and_its_hash_is_of_what_was_changed(config):
    read = Config.from_dict(json.loads(json.dumps(asdict(config))))
    assert read == config and read.hash == config.hash and Config(**config.changed) == config
    text = json.dumps({k: v for k, v in asdict(config).items() if v != getattr(Config(), k)}, sort_keys=True)
    assert config.hash == hashlib.sha256(text.encode()).hexdigest()[:12]


@given(configurations(), configurations())
def test_two_configurations_have_one_hash_only_if_they_are_equal(one, other):
    assert (one.hash == other.hash) == (one == other)


@settings(max_examples=1)
@given(st.lists(configurations(), min_size=40, max_size=40))
def test_hashes_are_the_same_in_every_process(configs):
    """And under every version of Python that runs this: those in hashes.json were written by one of them."""
    code = ("import json, sys; from symbreak.config import Config; "
            "print(*(Config.from_dict(values).hash for values in json.load(sys.stdin)))")
    for seed in "0", "4711":
        found = subprocess.run([sys.executable, "-c", code], env=os.environ | dict(PYTHONHASHSEED=seed), text=True,
                               input=json.dumps([asdict(c) for c in configs]), capture_output=True, check=True)
        assert found.stdout.split() == [c.hash for c in configs]


@pytest.mark.parametrize("name, call", {
    "depth": lambda huge: ConstNet(huge), "groups": lambda huge: he_(torch.ones(4, 4), groups=-huge),
    "threads": lambda huge: cpu_threads(huge).__enter__(), "rho": rectified_cosine,
    "points": lambda huge: growth_rate(None, points=-huge), "high": lambda huge: growth_rate(None, high=huge),
    "eps": lambda huge: three_copies(Config(), -huge), "threshold": lambda huge: predict(Config(), 1e-9, huge),
    "seeds": lambda huge: predict(Config(), 1e-9, seeds=-huge),
    "steps": lambda huge: check(nn.Linear(2, 2), torch.ones(3, 2), steps=-huge),
    "lr": lambda huge: check(nn.Linear(2, 2), torch.ones(3, 2), lr=-huge)}.items())
def test_a_number_of_more_digits_than_python_writes_is_refused_by_name(name, call):
    with pytest.raises(ValueError, match=f"^{name}: int of too many digits; allowed: "): call(10 ** 5000)


@given(configurations(), st.integers(0, 1000), st.floats(0, 1))
def test_a_learning_rate_is_never_negative_nor_above_the_one_asked_for(config, epoch, part):
    assert 0 <= learning_rate(config, epoch, part) <= config.lr * (1 + EPS)


# init strings and initialisers

@given(st.text("ih1_x I", max_size=9) | st.just("identical"), st.integers(0, 6))
def test_an_init_string_is_refused_by_name_or_read_letter_by_letter(init, blocks):
    try: letters = parse_init(init, blocks)
    except ValueError as e: assert str(e).startswith("init:")
    else:
        assert letters == ("1" + blocks * "i" if init == "identical" else init.replace("_", ""))
        assert len(letters) == 1 + blocks and set(letters) <= set("ih1")


@given(st.text("ih1", min_size=4, max_size=4))
def test_a_network_has_the_letters_it_is_asked_for(letters):
    net = LeakyNet(letters, 7, 1)
    assert "".join(layer.letter for layer in weight_layers(net)[:-1]) == letters
    assert distinct_features(net.stem.weight) == {"1": 1, "i": 3, "h": 16}[letters[0]]
    assert (asymmetry(net) == 0) == (letters[0] == "1" and "h" not in letters)


@given(st.sampled_from((averaging_, identity_, he_, leaky_normal_, delta_orthogonal_)), array_shapes(max_dims=5),
       st.one_of(finite, st.floats(), st.sampled_from((0, 1, -1, 2, True, None, "2"))),
       st.sampled_from((1, 1, 1, 2, 3, 0, 1.5, None)), st.sampled_from((torch.float32, torch.float64, torch.int32)))
def test_an_initialiser_refuses_by_name_or_fills_with_finite_numbers(fill, shape, scale, groups, dtype):
    weight = torch.full(shape, math.nan).to(dtype)
    try: assert fill(weight, scale, groups=groups) is weight
    except ValueError as e: assert str(e).split(":")[0] in ("weight", "groups", "factor", "gain", "slope"), e
    else:
        assert weight.isfinite().all()
        taps = weight.flatten(2) if weight.dim() == 4 else weight[..., None]
        if fill is averaging_:
            off = abs(weight[0].double().sum() - scale)
            assert distinct_features(weight) == 1 and off <= 1e-5 * abs(scale) + 1e-30
        if fill is identity_: assert weight.count_nonzero() == (len(weight) if weight.any() else 0)
        if fill is delta_orthogonal_ and 1e-3 < abs(scale) < 1e3:
            for part in taps.sum(2).double().split(len(weight) // groups):
                eye = scale ** 2 * torch.eye(weight.shape[1], dtype=torch.float64)
                assert torch.allclose(part.T @ part, eye, rtol=0, atol=1e-5 * scale ** 2)


# measures

def tensors(elements, **shape):
    return arrays(np.float64, array_shapes(**shape), elements=elements).map(torch.from_numpy)


MATRICES = dict(min_dims=2, max_dims=2, min_side=1, max_side=6)


@given(st.one_of(tensors(finite, max_dims=4, max_side=5), tensors(st.sampled_from((0., -0., 1.)), **MATRICES)))
def test_distinct_features_are_those_of_a_set(x):
    rows = {tuple(row) for row in (x.flatten(1) if x.dim() > 1 else x[:, None]).tolist()}  # in which -0. is 0.
    assert distinct_features(x) == distinct_features(x.flip(0)) == len(rows)
    assert 1 <= distinct_features(x, atol=1.) <= len(rows)


@given(tensors(finite, **MATRICES), st.sampled_from(("forward", "backward")), st.sampled_from(("one", "nan", "drop")))
@example(torch.tensor([[1e-300, 0.], [0., 1e-300]], dtype=torch.float64), "forward", "one")
@example(torch.tensor([[1.7e308, -1.7e308], [-1.7e308, 1.7e308]], dtype=torch.float64), "forward", "one")
def test_a_correlation_of_finite_weights_is_a_correlation(weight, over, constant):
    vectors = weight if over == "forward" else weight.T
    varying = (vectors != vectors[:, :1]).any(1)
    count = {"one": len(vectors), "nan": len(vectors) if varying.all() else 0, "drop": int(varying.sum())}[constant]
    found = weight_correlation(weight, over, constant)
    if count < 2: assert math.isnan(found)
    else: assert -1 / (count - 1) - EPS <= found <= 1 + EPS


@given(tensors(plain, min_dims=2, max_dims=2, min_side=2, max_side=6))
def test_a_correlation_is_the_mean_of_numpys(weight):
    assume((weight != weight[:, :1]).any(1).all())
    pairs = np.corrcoef(weight.numpy())[np.triu_indices(len(weight), 1)]
    assert weight_correlation(weight, constant="nan") == pytest.approx(pairs.mean(), abs=1e-9)


@given(tensors(finite, min_dims=2, max_dims=3, min_side=1, max_side=6))
@example(torch.tensor([[1.7e308], [-1.7e308]], dtype=torch.float64))
@example(torch.tensor([[1e-320, 1.], [0., 1.]], dtype=torch.float64))
def test_an_effective_width_of_finite_features_is_one(features):
    x = features.movedim(1, 0).flatten(1)
    varies = (x != x[:, :1]).any(1)
    width = effective_width(features)
    assert width == 0 if not varies.any() else 1 - EPS <= width <= varies.sum() + EPS


@given(st.integers(2, 5), st.integers(1, 4), st.integers(-1000, 1000), st.data())
def test_an_asymmetry_is_zero_for_copies_only_and_has_no_unit(width, pixels, exponent, data):
    net = UniqueFeatureMLP(pixels, width, num_classes=3).double()
    drawn = [data.draw(arrays(np.float64, tuple(p.shape), elements=plain)) for p in net.parameters()]
    def filled(scale):
        for p, values in zip(net.parameters(), drawn):
            p.data = torch.ldexp(torch.from_numpy(values), torch.tensor(scale))
        return asymmetry(net), layer_asymmetry(net)
    whole, layers = filled(0)
    hidden, bias, head, _ = drawn  # the bias of the head is of classes
    copies = all((values == values[:1]).all() for values in (hidden, bias, head.T))
    assert (whole == 0) == copies and 0 <= whole <= 1
    assert filled(exponent) == (whole, layers)


@given(tensors(st.sampled_from((0., -0., 1., 2.)), **MATRICES))
def test_a_partition_has_equal_rows_together_and_no_others(rows):
    group = partition(rows)
    assert torch.equal(group[:, None] == group, (rows[:, None] == rows).all(2)) and group[0] == 0
    assert group.unique().tolist() == list(range(group.max() + 1))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 100))
def test_a_quotient_is_the_same_network(width, distinct, seed):
    torch.manual_seed(seed)
    net = UniqueFeatureMLP(4, width, num_classes=3, distinct=min(width, distinct)).double()
    small, x = quotient(net), torch.randn(5, 4, dtype=torch.float64)
    again = expand(small)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))
    assert torch.allclose(small(x), net(x), rtol=1e-12, atol=1e-12)
    assert len(list(small.parameters())[0]) == min(width, distinct)


# images

@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 40))
def test_a_share_of_the_images_is_the_same_share_of_every_class(sizes, k):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))[torch.randperm(sum(sizes))]
    assume(k <= len(labels))
    chosen = stratified(labels, k)
    assert len(chosen.unique()) == k and torch.equal(chosen, chosen.sort().values)
    share = k / len(labels) * labels.bincount()
    assert ((labels[chosen].bincount(minlength=len(sizes)) - share).abs() < 1).all()


IMAGE, OTHER_SIZE, JUNK, EMPTY, FOLDER = "image", "other size", "junk", "empty", "folder"
CLASS = st.dictionaries(st.sampled_from(("a.png", "b.png", "ü.png", ".hidden", "no suffix")),
                        st.sampled_from((*[IMAGE] * 5, OTHER_SIZE, JUNK, EMPTY, FOLDER)), max_size=3)
SPLIT = st.dictionaries(st.sampled_from(("cat", "dog", "é", "é", ".x")), CLASS, max_size=3)
LAYOUT = st.one_of(
    st.dictionaries(st.sampled_from(("train", "test", "val", "valid", "other")), SPLIT, max_size=3),
    st.lists(st.sampled_from(("cat", "dog", "é")), min_size=1, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({split: st.fixed_dictionaries({
            name: CLASS.filter(len) for name in names}) for split in ("train", "test")})))


def build(root, layout):
    for split, classes in layout.items():
        (root / split).mkdir(parents=True)
        for name, files in classes.items():
            (root / split / name).mkdir()
            for i, (file, kind) in enumerate(files.items()):
                path = root / split / name / file
                if kind == FOLDER: path.mkdir()
                elif kind in (JUNK, EMPTY): path.write_bytes(b"junk" if kind == JUNK else b"")
                else: Image.new("L", (9, 9) if kind == IMAGE else (9, 8), 10 * i + len(name)).save(path, "png")


def seen(layout, split):
    """Classes and the kinds of their files, without what is hidden."""
    return {name: [kind for file, kind in sorted(files.items()) if file[0] != "."]
            for name, files in sorted(layout.get(split, {}).items()) if name[0] != "."}


@given(LAYOUT)
def test_a_folder_of_images_is_refused_by_name_or_read_whole(layout):
    with tempfile.TemporaryDirectory() as place:
        root = Path(place, "images")
        root.mkdir()
        build(root, layout)
        try: data = load(f"folder:{root}", cache=Path(place, "cache"), progress=False)
        except OSError as e: assert str(e).startswith(str(root)) and ";" in str(e), e
        else:
            test = next(split for split in ("test", "valid", "val") if split in layout)
            for split, images, labels in (("train", *data.tensors[:2]), (test, *data.tensors[2:])):
                kinds = seen(layout, split)
                assert data.classes == tuple(kinds) and all(kinds.values())
                assert {kind for files in kinds.values() for kind in files} in ({IMAGE}, {OTHER_SIZE})
                assert labels.bincount(minlength=len(kinds)).tolist() == [len(files) for files in kinds.values()]
                assert images.shape[:2] == (len(labels), 3)


# files

def nested(inside): return st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=3), inside, max_size=4)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | finite | st.text(max_size=5), nested)
OBJECT = st.dictionaries(st.text(max_size=5).filter(lambda name: name != "seal"), JSON, max_size=4)


@pytest.fixture(scope="module")
def path(tmp_path_factory): return tmp_path_factory.mktemp("files") / "x.json"


@given(OBJECT)
def test_what_is_sealed_is_read_again(path, value):
    write_json(path, sealed(value))
    assert read_sealed(path, "restore it") == sealed(value) == sealed(sealed(value))


def as_written(value) -> str: return json.dumps(value, sort_keys=True)  # for Python, 0 and false are equal


@given(OBJECT, OBJECT)
def test_a_seal_is_of_one_value(path, value, other):
    forged = other | dict(seal=sealed(value)["seal"])
    write_json(path, forged)
    if as_written(forged) == as_written(sealed(value)): assert read_sealed(path, "restore it") == forged
    else:
        with pytest.raises(ValueError, match="x.json: damaged, its seal is broken; restore it"):
            read_sealed(path, "restore it")


@given(st.lists(OBJECT, max_size=4), st.binary(max_size=20))
def test_lines_are_read_as_they_were_written_or_the_damaged_one_is_named(path, rows, more):
    write_lines(path, rows)
    assert read_lines(path) == rows
    with path.open("ab") as f: f.write(more)
    try: found = read_lines(path)
    except ValueError as e: assert str(e).startswith(f"{path}: damaged, ")
    else: assert found[:len(rows)] == rows and all(isinstance(row, dict) for row in found)


def leaves(value):
    """All numbers and texts in a value."""
    if isinstance(value, dict): value = list(value.values())
    return [leaf for inside in value for leaf in leaves(inside)] if isinstance(value, list) else [value]


@given(st.recursive(st.floats() | st.text(max_size=3), nested))
def test_nothing_but_nan_is_left_out(value):
    assert leaves(without_nan(value)) == [None if leaf != leaf else leaf for leaf in leaves(value)]
