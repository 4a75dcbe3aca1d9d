"""The models in timm's registry: ``import mobilemamba.timm``, then ``timm.create_model("mobilemamba_s6")``.

Inside this package ``timm`` is the library, as imports are absolute. docs/integrations.md shows the use.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from . import weights
from .models import PRESETS, MobileMamba
from .models.backbone import checked_images
from .models.heads import Logits, one_head
from .weights import published
from .weights.identify import guess_model_args
from .weights.networks import find_network
from .weights.table import ASSETS
from .weights.timm_config import ARCHITECTURE, pretrained_cfg

__all__ = ["TimmMobileMamba", "default_cfgs"]


def checked_pool(global_pool: str, num_classes: int) -> str:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool: expected 'avg' or '', got {global_pool!r:.100}")
    if not global_pool and num_classes:
        raise ValueError(f"global_pool: expected 'avg' for a head of {num_classes} classes, got ''")
    return global_pool


class TimmMobileMamba(MobileMamba):
    """A :class:`MobileMamba` with the methods of timm's models. Its parameters have the same names.

    Args:
        global_pool: ``"avg"``; or ``""``, with ``num_classes=0``, for the last feature map in place of logits.
        drop_rate: rate of the dropout on the pooled features.
        device, dtype: of the parameters and buffers; None for torch's defaults.
        options: arguments of :class:`MobileMamba`. With ``distillation=True`` the model has two heads; training returns
            their mean, as evaluation does, or a tuple of both after :meth:`set_distilled_training`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        with torch.device(device or torch.get_default_device()):
            super().__init__(**options)
        if dtype is not None:
            self.to(dtype)
        if not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate: expected a number of at least 0 and below 1, got {drop_rate!r:.100}")
        self.drop_rate, self.head_hidden_size = float(drop_rate), self.num_features
        self.distilled_training = False
        self.global_pool = checked_pool(global_pool, self.num_classes)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Logits:  # type: ignore[override]
        """Pooling, dropout and classifier on the last feature map ``(B, num_features, H, W)``.

        Returns:
            Logits ``(B, num_classes)``. With ``pre_logits=True`` the input of the classifier.
        """
        if self.global_pool:
            x = x.mean((2, 3))
        if self.drop_rate > 0.0:
            x = F.dropout(x, self.drop_rate, self.training)
        if pre_logits:
            return x
        logits = self.head(x)
        if not torch.jit.is_scripting():
            if isinstance(logits, tuple) and not self.distilled_training:
                return (logits[0] + logits[1]) / 2
        return logits

    @torch.jit.unused
    def set_distilled_training(self, enable: bool = True) -> None:
        """Whether training returns the outputs of both heads, for a loss with a teacher.

        Raises:
            ValueError: the model has one head.
        """
        if enable and not self.distillation:
            raise ValueError(
                "set_distilled_training: expected a model with two heads (distillation=True), got one head"
            )
        self.distilled_training = enable

    @torch.jit.unused
    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head: BatchNorm and a linear layer; two of them in a model with two heads."""
        return (self.head.labels, self.head.teacher) if self.distillation and self.num_classes else self.head  # type: ignore[return-value]

    @torch.jit.unused
    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:  # type: ignore[override]
        """Replace the head by a fresh one, as :meth:`MobileMamba.reset_classifier`.

        Args:
            num_classes: classes of the new head; 0 for no head.
            global_pool: ``"avg"`` or, without a head, ``""``; None keeps the model's.
        """
        pool = checked_pool(self.global_pool if global_pool is None else global_pool, num_classes)
        super().reset_classifier(num_classes)
        self.global_pool = pool

    @torch.jit.unused
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the parameters' names, from the images up: for learning rates that fall with depth.

        The stem is a group, each stage or, if not ``coarse``, each transition and each block; the head is the last one.
        """
        if coarse:
            return {"stem": r"^patch_embed", "blocks": r"^stages\.(\d+)"}
        blocks = [(r"^stages\.(\d+)\.transition", (-1,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": blocks}

    @torch.jit.unused
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The feature maps after some stages, of images ``(B, in_chans, H, W)``.

        Args:
            indices: numbers of the stages, negative ones from the end; the last ``n`` for an int, all for None.
            norm: has no effect: there is no norm after the last stage.
            stop_early: leave out the stages after the last one that is wanted.
            output_fmt: ``"NCHW"`` or ``"NHWC"``: the order of the dimensions of the maps.
            intermediates_only: return the list alone.

        Returns:
            The last map that was computed ``(B, C, H, W)``, and the list of the maps, in the order of the stages.

        Raises:
            ValueError: ``output_fmt`` is another one, or the images do not fit.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NHWC', got {str(output_fmt)!r:.100}")
        wanted, last = feature_take_indices(len(self.stages), indices)
        if stop_early and last < len(self.stages) - 1:
            x = self.patch_embed(checked_images(x, self.in_chans))
            maps = []
            for stage in self.stages[: last + 1]:
                x = stage(x)
                maps.append(x)
        else:
            maps = self.forward_stages(x)
        found = [x for i, x in enumerate(maps) if i in wanted]
        if output_fmt == "NHWC":
            found = [x.permute(0, 2, 3, 1) for x in found]
        return found if intermediates_only else (maps[-1], found)

    @torch.jit.unused
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages that the maps of ``indices`` do not need. Returns the numbers of the wanted stages.

        Args:
            indices: as for :meth:`forward_intermediates`.
            prune_norm: has no effect: there is no norm after the last stage.
            prune_head: drop pooling and head too. They always go with the last stage.
        """
        wanted, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        if prune_head or shortened:
            self.reset_classifier(0, "")
        if shortened:
            self.stages = nn.ModuleList(list(self.stages)[: last + 1])
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        return list(wanted)

    @torch.jit.unused
    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load a checkpoint of any format that :func:`mobilemamba.weights.read` knows.

        The first convolution is adapted to the model's image channels. Two heads become one in a model with one head.
        The model keeps its random head if it has another number of classes.

        Raises:
            OSError, ValueError: as :func:`mobilemamba.weights.read`; or the weights do not fit.
        """
        stored = weights.adapt_channels(weights.read(checkpoint_path), self.in_chans)
        tensors = stored.state_dict if self.distillation else one_head(stored.state_dict)
        found = guess_model_args(tensors)
        differ = self.num_classes != found["num_classes"]
        if self.distillation and not found["distillation"] and not differ:
            raise ValueError(f"{stored.path}: expected weights with two heads for distillation=True, got one head")
        weights.load_into(self, tensors, allow_head_mismatch=differ, source=stored.path)


def checkpoint_filter(tensors: Mapping[str, Any], model: MobileMamba) -> dict[str, Tensor]:
    """The weights that timm read from a file or from the Hub by ``model``'s names, with one head for one head."""
    network = find_network(tensors)
    if published.is_published(network):
        network = published.convert(network)
    return network if model.distillation else one_head(network)


def _tagged(entry: weights.WeightsEntry) -> str:
    """timm's name of weights: architecture and tag."""
    tag = "fashion_mnist" if entry.drive_id is None else "dist_in1k" if entry.variant == "distilled" else "in1k"
    return f"{ARCHITECTURE}{entry.preset}.{tag}"


def _cfg(entry: weights.WeightsEntry) -> dict[str, Any]:
    cfg = pretrained_cfg(entry.preset, entry.preprocessing, len(entry.labels), two_heads=False)
    if entry.drive_id is None:
        cfg |= {"file": str(ASSETS / entry.file_name), "label_names": entry.labels}
    else:
        cfg["url"] = (entry.url, entry.file_name)
    return {**cfg, "custom_load": True}  # by load_pretrained()


NAMED = {_tagged(entry): entry for entry in weights.ENTRIES}
default_cfgs = generate_default_cfgs({name: _cfg(entry) for name, entry in NAMED.items()})


def _create(preset: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """The model, or with ``features_only=True`` timm's FeatureGetterNet around it."""
    name = ARCHITECTURE + preset
    overlay = dict(options.pop("pretrained_cfg_overlay", None) or {})
    if options.get("distillation"):
        overlay.setdefault("classifier", ("head.labels.linear", "head.teacher.linear"))
    cfg = resolve_pretrained_cfg(name, options.get("pretrained_cfg"), overlay)
    if pretrained and cfg.custom_load:  # the table's weights: their download is continued, and its hash is checked
        if options.get("cache_dir") is not None:
            raise ValueError(
                "cache_dir: expected None for the published weights; MOBILEMAMBA_WEIGHTS names their folder"
            )
        overlay |= {"file": str(weights.download(NAMED[f"{name}.{cfg.tag}"])), "custom_load": True}
    args = {key: value for key, value in PRESETS[preset].items() if key not in ("num_classes", "in_chans")}  # of cfg
    args |= options
    return build_model_with_cfg(
        TimmMobileMamba,
        name,
        pretrained,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=checkpoint_filter,
        feature_cfg={"out_indices": tuple(range(len(args["widths"]))), "feature_cls": "getter"},
        **args,
    )


def mobilemamba_nano(pretrained: bool = False, **options: Any) -> nn.Module:
    """MobileMamba-nano, for grey images of 28 pixels."""
    return _create("nano", pretrained, options)


def mobilemamba_t2(pretrained: bool = False, **options: Any) -> nn.Module:
    """MobileMamba-T2, for 192 pixels."""
    return _create("t2", pretrained, options)


def mobilemamba_t4(pretrained: bool = False, **options: Any) -> nn.Module:
    """MobileMamba-T4, for 192 pixels."""
    return _create("t4", pretrained, options)


def mobilemamba_s6(pretrained: bool = False, **options: Any) -> nn.Module:
    """MobileMamba-S6, for 224 pixels."""
    return _create("s6", pretrained, options)


def mobilemamba_b1(pretrained: bool = False, **options: Any) -> nn.Module:
    """MobileMamba-B1, for 256 pixels."""
    return _create("b1", pretrained, options)


def mobilemamba_b2(pretrained: bool = False, **options: Any) -> nn.Module:
    """MobileMamba-B2: the network of B1, for 384 pixels."""
    return _create("b2", pretrained, options)


def mobilemamba_b4(pretrained: bool = False, **options: Any) -> nn.Module:
    """MobileMamba-B4: the network of B1, for 512 pixels."""
    return _create("b4", pretrained, options)


for _function in (
    mobilemamba_nano,
    mobilemamba_t2,
    mobilemamba_t4,
    mobilemamba_s6,
    mobilemamba_b1,
    mobilemamba_b2,
    mobilemamba_b4,
):
    register_model(_function)  # adds the name to __all__, and the function's default_cfgs
