"""Switch the attention of diffusers' transformers to rope_cupy, and back.

    from rope_cupy.integrations.diffusers import disable, enable

    print(enable(pipeline))  # or a transformer
    disable(pipeline)

`enable` replaces every attention processor that it knows by a stand-in. The stand-in normalises,
rotates and joins q and k, between the model's own projections and diffusers' own attention.
Results equal the model's except for one rounding, and gradients are recorded. You may compile a
model, copy it, add LoRA or quantize it before or after, because weights are read at each call.

`KNOWN` lists the processors. They belong to Flux (and Chroma, Bria, LongCat, Ovis), Flux 2 and 3,
Qwen-Image (Edit, Layered), Wan (I2V, VACE, Animate, ChronoEdit), SkyReels, HunyuanVideo 1.0 and
1.5, HunyuanImage, Motif, Z-Image, LTX, LTX-2, CogVideoX, ConsisID, CogView 4, GLM-Image, Lumina 2,
Cosmos, HiDream, Kandinsky 5, Mochi, Sana-Video, OmniGen and ERNIE-Image.

A stand-in passes a call that it cannot make to the original processor: a call without a table, on
another device, under autocast, in context parallelism, or with norms that have hooks or weights of
another dtype. The logger "rope_cupy" reports each of these at the level DEBUG.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from ._diffusers_image import (
    BriaFibo2,
    CogView4,
    ErnieImage,
    Flux3,
    GlmImage,
    Lumina2,
    OmniGen,
    ZImage,
)
from ._diffusers_joint import (
    Flux,
    Flux2,
    Flux2KV,
    Flux2KVParallel,
    Flux2Parallel,
    HiDream,
    HunyuanVideo,
    HunyuanVideo15,
    Mochi,
    QwenImage,
)
from ._diffusers_stand_in import StandIn, stand_in_of, why_left
from ._diffusers_video import (
    LTX,
    LTX2,
    CogVideoX,
    Cosmos,
    FusedCogVideoX,
    Kandinsky5,
    LTX2Perturbed,
    SanaVideo,
    Wan,
)

__all__ = ["KNOWN", "Attention", "Report", "disable", "enable"]

PROCESSOR = "processor"  # the attribute of an attention
TRANSFORMERS = "diffusers.models.transformers.transformer_"

# Stand-ins by the module and the class of the processor that they replace.
KNOWN: dict[str, type[StandIn]] = {
    TRANSFORMERS + "flux.FluxAttnProcessor": Flux,
    TRANSFORMERS + "flux2.Flux2AttnProcessor": Flux2,
    TRANSFORMERS + "flux2.Flux2ParallelSelfAttnProcessor": Flux2Parallel,
    TRANSFORMERS + "flux2.Flux2KVAttnProcessor": Flux2KV,
    TRANSFORMERS + "flux2.Flux2KVParallelSelfAttnProcessor": Flux2KVParallel,
    TRANSFORMERS + "flux3.Flux3AttnProcessor": Flux3,
    TRANSFORMERS + "bria.BriaAttnProcessor": Flux,
    TRANSFORMERS + "bria_fibo.BriaFiboAttnProcessor": Flux,
    TRANSFORMERS + "bria_fibo2.BriaFibo2AttnProcessor": BriaFibo2,
    TRANSFORMERS + "longcat_image.LongCatImageAttnProcessor": Flux,
    TRANSFORMERS + "ovis_image.OvisImageAttnProcessor": Flux,
    TRANSFORMERS + "qwenimage.QwenDoubleStreamAttnProcessor2_0": QwenImage,
    TRANSFORMERS + "wan.WanAttnProcessor": Wan,
    TRANSFORMERS + "wan_animate.WanAttnProcessor": Wan,
    TRANSFORMERS + "chronoedit.WanAttnProcessor": Wan,
    TRANSFORMERS + "skyreels_v2.SkyReelsV2AttnProcessor": Wan,
    TRANSFORMERS + "hunyuan_video.HunyuanVideoAttnProcessor2_0": HunyuanVideo,
    TRANSFORMERS + "hunyuan_video15.HunyuanVideo15AttnProcessor2_0": HunyuanVideo15,
    TRANSFORMERS + "hunyuanimage.HunyuanImageAttnProcessor": HunyuanVideo,
    TRANSFORMERS + "motif_video.MotifVideoAttnProcessor2_0": HunyuanVideo,
    TRANSFORMERS + "z_image.ZSingleStreamAttnProcessor": ZImage,
    "diffusers.models.controlnets.controlnet_z_image.ZSingleStreamAttnProcessor": ZImage,
    TRANSFORMERS + "ltx.LTXVideoAttnProcessor": LTX,
    TRANSFORMERS + "ltx2.LTX2AudioVideoAttnProcessor": LTX2,
    TRANSFORMERS + "ltx2.LTX2PerturbedAttnProcessor": LTX2Perturbed,
    TRANSFORMERS + "lumina2.Lumina2AttnProcessor2_0": Lumina2,
    TRANSFORMERS + "cosmos.CosmosAttnProcessor2_0": Cosmos,
    TRANSFORMERS + "cogview4.CogView4AttnProcessor": CogView4,
    TRANSFORMERS + "glm_image.GlmImageAttnProcessor": GlmImage,
    TRANSFORMERS + "hidream_image.HiDreamAttnProcessor": HiDream,
    TRANSFORMERS + "kandinsky.Kandinsky5AttnProcessor": Kandinsky5,
    TRANSFORMERS + "sana_video.SanaLinearAttnProcessor3_0": SanaVideo,
    TRANSFORMERS + "omnigen.OmniGenAttnProcessor2_0": OmniGen,
    TRANSFORMERS + "ernie_image.ErnieImageSingleStreamAttnProcessor": ErnieImage,
    "diffusers.models.attention_processor.MochiAttnProcessor2_0": Mochi,
    "diffusers.models.attention_processor.CogVideoXAttnProcessor2_0": CogVideoX,
    "diffusers.models.attention_processor.FusedCogVideoXAttnProcessor2_0": FusedCogVideoX,
}


class Attention(NamedTuple):
    """An attention of a model.

    Attributes:
        path: where it is in the model or the pipeline.
        processor: the name of the class of its processor.
        reason: why `enable` left the processor, or "" if it was replaced.
    """

    path: str
    processor: str
    reason: str = ""


class Report(NamedTuple):
    """What `enable` has replaced and left; as text, counted by processor.

    Attributes:
        replaced: every `Attention` that has a stand-in now.
        left: every `Attention` that keeps its processor.
    """

    replaced: tuple[Attention, ...]
    left: tuple[Attention, ...]

    def __str__(self) -> str:
        lines = [
            f"{verb} {number} {processor}{reason and ': ' + reason}"
            for verb, attentions in (("replaced", self.replaced), ("left", self.left))
            for (processor, reason), number in Counter([each[1:] for each in attentions]).items()
        ]
        return "\n".join(lines) or "no attention with a processor"


def enable(model: Any) -> Report:
    """Put stand-ins for the attention processors of a model, or of all models of a pipeline.

    Args:
        model: a module of PyTorch, such as a transformer of diffusers, or a pipeline, which has
            modules as `components` or as attributes.

    Returns:
        a Report: `replaced` and `left` are tuples of Attention, each with a path in the model, the
        name of a processor, and the reason if it was left. Attention that already has a stand-in
        counts as replaced.

    Raises:
        TypeError: `model` is not a module and has none.
        ValueError: no attention has a known processor. Nothing was changed.
    """
    replaced: list[Attention] = []
    left: list[Attention] = []
    stand_ins: list[tuple[torch.nn.Module, StandIn]] = []
    for owner, part in _models(model):
        for path, module in part.named_modules():
            processor = getattr(module, PROCESSOR, None)
            if processor is None or not callable(processor):
                continue
            kind = type(processor)
            if isinstance(processor, StandIn):
                kind, reason = processor.stands_for, ""
            else:
                found = KNOWN.get(f"{kind.__module__}.{kind.__qualname__}")
                reason = "it is not known"
                if found is not None:
                    reason = why_left(found, processor, module, path.rpartition(".")[2])
                if found is not None and not reason:
                    stand_ins.append((module, stand_in_of(found, processor)))
            where = ".".join(filter(None, [owner, path]))
            (left if reason else replaced).append(Attention(where, kind.__name__, reason))
    report = Report(tuple(replaced), tuple(left))
    if not replaced:
        raise ValueError(
            "model must have attention of a processor that is known, got: "
            f"{report}{_elsewhere(model)}"
        )
    for module, stand_in in stand_ins:
        setattr(module, PROCESSOR, stand_in)
    return report


def _elsewhere(model: Any) -> str:
    """Return what to call for a model of the other library."""
    if type(model).__module__.partition(".")[0] != "transformers":
        return ""
    return ": for a model of transformers call rope_cupy.integrations.transformers.enable"


def disable(model: Any) -> None:
    """Restore the original attention processors of a model, or of all models of a pipeline.

    A model without stand-ins does not change. Raises TypeError as `enable` does.
    """
    for _, part in _models(model):
        for module in part.modules():
            processor = getattr(module, PROCESSOR, None)
            if isinstance(processor, StandIn):
                setattr(module, PROCESSOR, processor.original)


def _models(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules of a model or a pipeline, each with its name in the pipeline."""
    if isinstance(model, torch.nn.Module):
        yield "", model
        return
    parts = getattr(model, "components", None)
    parts = parts if isinstance(parts, dict) else getattr(model, "__dict__", {})
    found = [(name, part) for name, part in parts.items() if isinstance(part, torch.nn.Module)]
    if not found:
        raise TypeError(
            "model must be a module of PyTorch or a pipeline that has modules, got "
            f"{type(model).__name__}"
        )
    yield from found
