"""The options of the functions that make models: what help() shows, what type checkers know, what is refused."""

import inspect
import pydoc
import typing

import pytest
import torch

import mobilemamba
from mobilemamba.models.options import ModelOptions

PRESET_FUNCTIONS = [getattr(mobilemamba, name) for name in mobilemamba.list_models()]


def constructor() -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(mobilemamba.MobileMamba).parameters)


def test_model_options_are_the_arguments_of_the_model():
    expected = typing.get_type_hints(mobilemamba.MobileMamba.__init__)
    assert expected.pop("return") is type(None)
    assert typing.get_type_hints(ModelOptions) == expected
    assert ModelOptions.__required_keys__ == frozenset()


@pytest.mark.parametrize("function", PRESET_FUNCTIONS, ids=lambda function: function.__name__)
def test_signature_has_every_option_with_the_presets_default(function):
    parameters = dict(inspect.signature(function).parameters)
    assert parameters.pop("pretrained").default is False
    assert list(parameters) == list(constructor())
    preset = mobilemamba.PRESETS[function.__name__]
    for name, parameter in parameters.items():
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default == preset.get(name, constructor()[name].default), name
        assert parameter.annotation == constructor()[name].annotation


def test_signature_of_create_model_has_every_option_without_a_default_of_one_preset():
    parameters = inspect.signature(mobilemamba.create_model).parameters
    assert list(parameters) == ["name", "pretrained", "allow_head_mismatch", *constructor()]
    assert {repr(parameters[name].default) for name in constructor()} == {"<the preset's>"}
    inspect.signature(mobilemamba.create_model).bind("s6")  # every option can be left out


def test_help_shows_the_options():
    text = pydoc.plain(pydoc.render_doc(mobilemamba.b1))
    for shown in (
        "num_classes: int = 1000",
        "widths: tuple[int, ...] = (200, 376, 448)",
        "depths: tuple[int, ...] = (2, 3, 2)",
        "drop_path_rate: float = 0.03",
        "-> mobilemamba.models.backbone.MobileMamba",
    ):
        assert shown in " ".join(text.split())


def test_defaults_that_are_shown_are_those_that_are_used():
    for function in PRESET_FUNCTIONS:
        shown = inspect.signature(function).parameters
        with torch.device("meta"):
            model = function()
        assert model.num_classes == shown["num_classes"].default
        assert model.in_chans == shown["in_chans"].default
        assert tuple(info["num_chs"] for info in model.feature_info) == shown["widths"].default
        assert tuple(len(stage.blocks) for stage in model.stages) == shown["depths"].default
        assert model.stages[-1].blocks[-1].drop_path.rate == pytest.approx(shown["drop_path_rate"].default)


@pytest.mark.parametrize("make", [mobilemamba.s6, lambda **options: mobilemamba.create_model("s6", **options)])
def test_a_wrong_option_is_named(make):
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_clases'"):
        make(num_clases=10)
