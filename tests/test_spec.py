"""QuantSpec: every valid combination, every way to be invalid, and the round trip through a dict."""

import itertools
import json

import pytest

from lowbit.spec import BITS, GROUP_SIZES, PACKED_BITS, ActivationSpec, QuantSpec

WEIGHTS = [QuantSpec(b, g, s) for b, g, s in itertools.product(BITS, GROUP_SIZES, (True, False))]
WITH_ACTIVATIONS = [QuantSpec(8, -1, s, ActivationSpec(8, d)) for s, d in itertools.product((True, False), repeat=2)]
ALL = WEIGHTS + WITH_ACTIVATIONS


def test_the_widths_and_groups_are_these():
    assert BITS == (2, 3, 4, 5, 6, 8) and PACKED_BITS == (2, 4, 8) and GROUP_SIZES == (32, 64, 128, -1)


@pytest.mark.parametrize("spec", ALL, ids=QuantSpec.label)
def test_codes_and_dict(spec):
    assert spec.max_code == 2**spec.bits - 1 and 2 * spec.mid_code == 2**spec.bits
    assert QuantSpec.from_dict(spec.to_dict()) == spec
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    fields = {"bits": spec.bits, "group_size": spec.group_size, "symmetric": spec.symmetric}
    if spec.activations is not None:
        fields["activations"] = {"bits": 8, "dynamic": spec.activations.dynamic}
    assert spec.to_dict() == fields


def test_a_dict_may_say_that_there_are_no_activations():
    assert QuantSpec.from_dict({**QuantSpec().to_dict(), "activations": None}) == QuantSpec()


def test_specs_are_values():
    assert len({*ALL, *(QuantSpec.from_dict(s.to_dict()) for s in ALL)}) == len(ALL)
    assert len({s.label() for s in ALL}) == len(ALL)
    with pytest.raises(AttributeError):
        ALL[0].bits = 8


@pytest.mark.parametrize("bits", BITS)
def test_the_default_symmetry_is_resolved_at_once(bits):
    spec = QuantSpec(bits)
    assert type(spec.symmetric) is bool and spec == QuantSpec(bits, 128, spec.symmetric)


def test_labels():
    assert QuantSpec(4, 128, False).label() == "w4g128asym" and QuantSpec(8, -1, True).label() == "w8gchsym"
    assert [spec.label() for spec in WITH_ACTIVATIONS] == [
        "w8a8gchsym", "w8a8staticgchsym", "w8a8gchasym", "w8a8staticgchasym",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 1}, r"bits must be one of \(2, 3, 4, 5, 6, 8\), got 1"),
        ({"bits": 7}, "got 7"),
        ({"bits": 4.0}, "got 4.0"),
        ({"bits": True}, "got True"),
        ({"bits": "4"}, "got '4'"),
        ({"group_size": 0}, r"group_size must be one of \(32, 64, 128, -1\).*got 0"),
        ({"group_size": 100}, "got 100"),
        ({"group_size": None}, "got None"),
        ({"symmetric": 1}, "symmetric must be True, False or None .*got 1"),
        ({"bits": 8, "group_size": -1, "activations": 8}, "activations must be an ActivationSpec or None, got 8"),
        ({"bits": 8, "activations": ActivationSpec()}, r"whole rows \(group_size -1\), got 8 bits and group_size 128"),
        ({"bits": 4, "group_size": -1, "activations": ActivationSpec()}, "weights of 8 bits .*got 4 bits"),
    ],
)
def test_a_bad_field_is_named_with_what_is_allowed(fields, message):
    with pytest.raises(ValueError, match=message):
        QuantSpec(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 4}, "activations can have 8 bits, got 4"),
        ({"bits": 8.0}, "got 8.0"),
        ({"dynamic": 1}, "dynamic must be True or False, got 1"),
    ],
)
def test_a_bad_activation_field_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ActivationSpec(**fields)


@pytest.mark.parametrize("activations", [{}, 8, {"bits": 8, "dynamic": True, "symmetric": True}])
def test_activations_from_a_dict_want_exactly_the_fields(activations):
    with pytest.raises(ValueError, match="an ActivationSpec has the fields"):
        QuantSpec.from_dict({"bits": 8, "group_size": -1, "symmetric": True, "activations": activations})


@pytest.mark.parametrize("fields", [{}, {"bits": 4, "group_size": 128}, {**QuantSpec().to_dict(), "act_order": True}])
def test_from_dict_wants_exactly_the_fields(fields):
    with pytest.raises(ValueError, match="a QuantSpec has the fields"):
        QuantSpec.from_dict(fields)


def test_number_of_groups():
    for k in range(1, 300):
        assert QuantSpec(4, -1).num_groups(k) == 1
        for g in (32, 64, 128):
            if k % g == 0:
                assert QuantSpec(4, g).num_groups(k) == k // g
            else:
                works = [s for s in GROUP_SIZES if s == -1 or k % s == 0]
                with pytest.raises(ValueError) as error:
                    QuantSpec(4, g).num_groups(k, "model.layers.3.mlp.down_proj")
                for part in ("model.layers.3.mlp.down_proj", f"group_size {g}", f"K = {k}", str(works)):
                    assert part in str(error.value)
