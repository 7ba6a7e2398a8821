"""The rows of a comparison: how they are written, and the folders that tell them again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equiframe import InputError
from equiframe.recipe import Recipe, setting_from_text, setting_to_text
from equiframe.variants import Variant, parse_variants


def test_a_variant_is_told_by_its_text_and_by_its_folder():
    variant = Variant.parse("etf-la:lr=5e-2:tau=.50")
    assert variant.method == "etf-la"
    assert dict(variant.fields) == {"lr": 0.05, "tau": 0.5}
    assert variant.name == "etf-la:tau=0.5:lr=0.05", "one name, however it was written"
    assert variant.folder == "etf-la+tau=0.5+lr=0.05"
    assert Variant.from_folder(variant.folder) == variant
    assert Variant.parse("ce").folder == "ce"
    assert Variant.from_folder("ce") == Variant("ce")
    for folder in ("ce+lr=.5", "thesis.tex", "ce+", "tuning", "ce+epcohs=3"):
        assert Variant.from_folder(folder) is None


def test_values_with_strange_characters_make_safe_folders():
    variant = Variant.parse("ce:backbone=timm:hf_hub/a+b:lr=0.1")
    assert dict(variant.fields) == {"backbone": "timm:hf_hub/a+b", "lr": 0.1}
    assert not set(variant.folder) & set('/\\:*?"<>|')
    assert Variant.from_folder(variant.folder) == variant


@given(st.floats(1e-12, 1e12), st.integers(1, 10**9), st.booleans())
def test_settings_keep_their_value(lr, epochs, pretrained):
    for name, value in (("lr", lr), ("epochs", epochs), ("pretrained", pretrained)):
        assert setting_from_text(setting_to_text(name, value)) == (name, value)
    variant = Variant("ce", (("epochs", epochs), ("lr", lr)))
    assert Variant.from_folder(variant.folder) == variant


def test_settings_are_of_their_fields_kind():
    assert setting_from_text("lr=1e-2") == ("lr", 0.01)
    assert setting_from_text("weight-decay = 0") == ("weight_decay", 0.0)
    assert setting_from_text("class_counts=5,4,3") == ("class_counts", (5, 4, 3))
    assert setting_to_text("class_counts", (5, 4)) == "class_counts=5,4"
    assert setting_from_text("pretrained=true") == ("pretrained", True)
    assert setting_from_text("norm=none") == ("norm", "none")
    for text, message in (
        ("lr", "must be FIELD=VALUE, got 'lr'"),
        ("epcohs=3", "unknown field 'epcohs'; did you mean 'epochs'"),
        ("epochs=3.5", "field 'epochs' must be a whole number, got '3.5'"),
        ("lr=fast", "field 'lr' must be a finite number, got 'fast'"),
        ("pretrained=yes", "field 'pretrained' must be true or false, got 'yes'"),
        ("class_counts=5,x", "field 'class_counts' must be a list of whole numbers"),
    ):
        with pytest.raises(InputError, match=message):
            setting_from_text(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("etf-al:tau=1", "unknown method 'etf-al'; did you mean 'etf-la'"),
        ("etf-la:tua=1", "unknown field 'tua'; did you mean 'tau'"),
        ("ce:seed=1", "seed cannot be set in a variant; compare has --seeds"),
        ("ce:imbalance=9", "imbalance is shared by all methods of a comparison; give it as --imbalance"),
        ("ce:lr=1:lr=2", "lr is set twice"),
        ("ce:", "unknown method 'ce:'"),
    ],
)
def test_variants_that_make_no_sense(text, message):
    with pytest.raises(InputError, match=message):
        Variant.parse(text)


def test_equal_variants_are_one():
    with pytest.raises(InputError, match=r"method etf-la:tau=0\.5 is listed twice"):
        parse_variants(["etf-la:tau=.5", "ce", "etf-la:tau=0.50"])
    with pytest.raises(InputError, match="field 'tau' does not belong to head 'linear' or loss 'ce'"):
        Variant.parse("ce:tau=1").recipe(Recipe(data="digits"))
