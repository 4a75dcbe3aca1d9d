"""Models on the Hugging Face Hub, through huggingface_hub's mixin: ``pip install '.[hub]'``.

``from mobilemamba.hub import MobileMamba`` is :class:`mobilemamba.MobileMamba` with ``from_pretrained``,
``save_pretrained`` and ``push_to_hub``. It is a class of its own because ``import mobilemamba`` imports no extra.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME
from safetensors.torch import save_file

from . import models, weights
from .data import Preprocessing
from .models import PRESETS
from .models.layers import PatchEmbedding
from .weights.identify import check_model_args
from .weights.timm_config import from_config, to_config

__all__ = ["MobileMamba"]

WEIGHTS_NAME = "model.safetensors"
SHOWN_LABELS = 20  # in the model card; config.json has all

PAPER = "https://arxiv.org/abs/2411.15941"

CARD = """# {preset} of MobileMamba

An image classifier: [MobileMamba]({paper}), preset `{preset}`, {parameters:.2f} M parameters, {classes} classes.

```python
from mobilemamba.hub import MobileMamba  # pip install 'mobilemamba[hub]'

model = MobileMamba.from_pretrained("{repository}").eval()
prepare = model.preprocessing.transforms()  # a path or PIL image -> ({channels}, {crop}, {crop})
logits = model(prepare("photo.jpg")[None])
```

The files are those of timm, too: after `import mobilemamba.timm`,
`timm.create_model("hf-hub:{repository}", pretrained=True)` makes the same model.

## Preprocessing

{preprocessing}

## Labels

{labels}
"""


def _classes(preset: str, args: Mapping[str, Any]) -> Any:
    return args.get("num_classes", PRESETS[preset].get("num_classes", 1000))


class HubMobileMamba(models.MobileMamba, ModelHubMixin, library_name="mobilemamba"):
    """A :class:`mobilemamba.MobileMamba` with the facts that its folder on the Hub states.

    It is made by :meth:`from_checkpoint` or by huggingface_hub's ``from_pretrained(FOLDER or "owner/name", revision=,
    token=, cache_dir=, force_download=, local_files_only=, **options)``. There ``options`` are arguments of
    :class:`mobilemamba.MobileMamba` that replace the stored ones, such as ``in_chans`` and ``num_classes``, and
    ``allow_head_mismatch=True``, which a new head needs. The mixin documents the other methods:

    - ``save_pretrained(FOLDER)`` writes ``config.json``, ``model.safetensors`` and ``README.md``, the model card.
    - ``push_to_hub("owner/name", private=, token=, branch=, ...)`` writes the same files to the Hub.

    Attributes:
        preset: name of the preset.
        model_args: arguments of the model that differ from the preset's.
        labels: names of the classes; None if they are unknown.
        preprocessing: how the model expects its images; None if it is unknown.
    """

    __jit_ignored_attributes__ = ("preset", "model_args", "labels", "preprocessing")  # torch.jit.script

    preset: str | None = None
    model_args: Mapping[str, Any] = {}
    labels: list[str] | None = None
    preprocessing: Preprocessing | None = None

    @classmethod
    def from_checkpoint(
        cls, source: weights.Checkpoint | weights.Source, preset: str | None = None
    ) -> "HubMobileMamba":
        """The model of a checkpoint, with its weights.

        Args:
            source: a :class:`mobilemamba.weights.Checkpoint`, for a model in memory; or as for
                :func:`mobilemamba.weights.load`: an entry of the table of weights, or the path of a file.
            preset: as for :func:`mobilemamba.weights.load`.

        Raises:
            OSError: no such file, or the download failed.
            ValueError: the preset is unknown, or the weights do not fit.
        """
        stored = source if isinstance(source, weights.Checkpoint) else weights.load(source, preset)
        return cls._make(stored, allow_head_mismatch=False)

    @classmethod
    def _make(cls, stored: weights.Checkpoint, allow_head_mismatch: bool) -> "HubMobileMamba":
        to_config(stored)  # refuses an unknown preset
        assert stored.preset is not None
        model = cls(**{**PRESETS[stored.preset], **stored.model_args})
        weights.load_into(model, stored.state_dict, allow_head_mismatch=allow_head_mismatch, source=stored.path)
        model.preset, model.model_args = stored.preset, dict(stored.model_args)
        model.labels, model.preprocessing = stored.labels, stored.preprocessing
        return model

    def checkpoint(self) -> weights.Checkpoint:
        """The weights and the facts, as :func:`mobilemamba.weights.save` takes them.

        Raises:
            ValueError: the model was not made from a checkpoint, or is fused.
        """
        if self.preset is None:
            raise ValueError(
                "preset: expected a model of from_checkpoint() or from_pretrained(), got one without facts"
            )
        if not isinstance(self.patch_embed, PatchEmbedding):
            raise ValueError("expected a model that is not fused: save the one that it was made from")
        args = {**self.model_args, "num_classes": self.num_classes, "distillation": self.distillation}
        known = PRESETS[self.preset]
        defaults = {"num_classes": known.get("num_classes", 1000), "distillation": False}
        args = {name: value for name, value in args.items() if defaults.get(name, known.get(name)) != value}
        labels = self.labels if self.labels is not None and len(self.labels) == self.num_classes else None
        return weights.Checkpoint(self.state_dict(), self.preset, args, labels, self.preprocessing)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        self.checkpoint()  # refuses before the mixin removes what is in the folder
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        stored = self.checkpoint()
        (save_directory / CONFIG_NAME).write_text(json.dumps(to_config(stored), indent=2) + "\n")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in stored.state_dict.items()}
        save_file(tensors, save_directory / WEIGHTS_NAME, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "HubMobileMamba":
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{pretrained_model_name_or_path}: {CONFIG_NAME}: expected JSON: {error}") from error

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        config: Mapping[str, Any] | None = None,
        allow_head_mismatch: bool = False,
        **options: Any,
    ) -> "HubMobileMamba":
        if config is None:
            raise ValueError(f"{model_id}: expected a {CONFIG_NAME}")
        if os.path.isdir(model_id):
            path = Path(model_id) / WEIGHTS_NAME
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file")
        else:
            path = Path(
                hf_hub_download(
                    model_id,
                    WEIGHTS_NAME,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        try:
            preset, args, labels, preprocessing = from_config(config)
            check_model_args(args)
            if labels is not None and len(labels) != (classes := _classes(preset, args)):
                raise ValueError(f"label_names: expected {classes} names, as num_classes says, got {len(labels)}")
        except ValueError as error:
            raise ValueError(f"{model_id}: {CONFIG_NAME}: {error}") from error
        check_model_args(options)
        args |= options
        if labels is not None and len(labels) != _classes(preset, args):
            labels = None  # a new head
        stored = weights.Checkpoint(weights.read(path).state_dict, preset, args, labels, preprocessing, path)
        if args.get("in_chans"):
            stored = weights.adapt_channels(stored, args["in_chans"])
        return cls._make(stored, allow_head_mismatch)

    def generate_model_card(self, repository: str = "OWNER/NAME", **metadata: Any) -> ModelCard:
        """The model card: facts, preprocessing and labels; ``model_card_kwargs`` of the mixin's methods come here.

        Args:
            repository: the name that the card's example loads.
            metadata: further fields of ``ModelCardData``, such as ``datasets`` and ``license``.
        """
        pre = self.preprocessing
        fields = {} if pre is None else {name: f"`{value}`" for name, value in pre.to_dict().items()}
        labels = list(self.labels or ())
        more = len(labels) - SHOWN_LABELS
        data = {"library_name": "mobilemamba", "pipeline_tag": "image-classification", "tags": ["mobilemamba", "timm"]}
        text = CARD.format(
            preset=self.preset,
            paper=PAPER,
            parameters=sum(parameter.numel() for parameter in self.parameters()) / 1e6,
            classes=self.num_classes,
            repository=repository,
            channels=self.in_chans,
            crop="H" if pre is None else pre.crop,
            preprocessing="\n".join(f"- {name}: {value}" for name, value in fields.items()) or "Unknown.",
            labels=", ".join(labels[:SHOWN_LABELS]) + (f" and {more} more, in `config.json`" if more > 0 else "")
            or "Unknown.",
        )
        return ModelCard(f"---\n{ModelCardData(**{**data, **metadata}).to_yaml()}\n---\n\n{text}")


#: The public name. TorchScript finds overloads by the name of a class, so a subclass must not have its parent's.
MobileMamba = HubMobileMamba
