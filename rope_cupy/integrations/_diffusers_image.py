"""Stand-ins for the attention of image models whose q and k come from one stream of tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from rope_cupy import RotaryTable

from ._diffusers_prologue import (
    Q_AND_K,
    Stream,
    UnknownCallError,
    by_head,
    checked,
    full_width,
    full_width_by_token,
    joint_mask,
    projected,
    projected_by_one,
    prologue,
    rotate_behind,
)
from ._diffusers_stand_in import StandIn


class ZImage(StandIn):
    """Z-Image: a table of complex numbers for each batch and token."""

    norms = Q_AND_K

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        freqs_cis: Any = None,
    ) -> Any:
        """Return the tokens after self-attention."""
        return self.after_attention(attn, hidden_states, attention_mask, freqs_cis)

    def after_attention(self, attn: Any, x: Any, mask: Any, freqs: Any) -> Any:
        """Return the tokens after self-attention."""
        self.check_call(x)
        table = RotaryTable.from_complex(complex_by_token(freqs, x))
        stream = Stream(*projected(attn, x), self.norms_in(attn, x.dtype), table)
        qkv = prologue([stream], stream.q.shape[-1] // attn.heads)
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None, :]
        y = attn.to_out[0](self.dispatch(*qkv, mask))
        return attn.to_out[1](y) if len(attn.to_out) > 1 else y


class BriaFibo2(ZImage):
    """Bria Fibo 2: as Z-Image, where it is not cross-attention."""

    cross = ("cross_attention",)

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        freqs_cis: Any = None,
    ) -> Any:
        """Return the tokens after self-attention."""
        if encoder_hidden_states is not None or len(attn.to_out) > 1:
            raise UnknownCallError("it is cross-attention")
        return self.after_attention(attn, hidden_states, attention_mask, freqs_cis)


class Lumina2(StandIn):
    """Lumina 2: grouped queries, and a table of complex numbers for each batch and token."""

    norms = Q_AND_K

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
        base_sequence_length: Any = None,
    ) -> Any:
        """Return the tokens after self-attention."""
        x = hidden_states
        self.check_call(x)
        if encoder_hidden_states is not x:
            raise UnknownCallError("it is cross-attention")
        table = RotaryTable.from_complex(complex_by_token(image_rotary_emb, x))
        stream = Stream(*projected(attn, x), self.norms_in(attn, x.dtype), table)
        q, k, v = prologue([stream], stream.q.shape[-1] // attn.heads)
        scale, mask, groups = attn.scale, attention_mask, attn.heads // k.shape[2]
        if base_sequence_length is not None:
            scale *= math.sqrt(math.log(x.shape[1], base_sequence_length))
        if groups > 1:
            k, v = (each.repeat_interleave(groups, dim=2) for each in (k, v))
        if mask is not None:
            mask = mask.bool().view(x.shape[0], 1, 1, -1)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        y: torch.Tensor
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return attn.to_out[1](attn.to_out[0](y.transpose(1, 2).flatten(2)))


class Flux3(StandIn):
    """Flux 3: norm and rotation in float32, rounded once."""

    norms = Q_AND_K

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Return the tokens after self-attention."""
        x = hidden_states
        self.check_call(x)
        table = full_width(*full_width_by_token(image_rotary_emb, x))
        norms = self.norms_in(attn, None)
        if norms is None:
            raise UnknownCallError("it has no norm")
        project = projected_by_one if attn.fused_projections else projected
        stream = Stream(*project(attn, x), norms._replace(round_norm=False), table)
        qkv = prologue([stream], stream.q.shape[-1] // attn.heads)
        return attn.to_out[1](attn.to_out[0](self.dispatch(*qkv, attention_mask)))


class ErnieImage(StandIn):
    """ERNIE-Image: angles in place of a table, one for each element, whose cos and sin are rounded.

    Products and sums are rounded as the original rounds them.
    """

    norms = Q_AND_K

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        attention_mask: Any = None,
        freqs_cis: Any = None,
    ) -> Any:
        """Return the tokens after self-attention."""
        x, mask = hidden_states, attention_mask
        self.check_call(x)
        angles = checked(freqs_cis, x)
        if angles.ndim != 4 or angles.shape[:3] not in ((1, x.shape[1], 1), (*x.shape[:2], 1)):
            raise UnknownCallError("its angles are not by token")
        norms, q_and_k = self.norms_in(attn, x.dtype), projected(attn, x)
        table = _of_angles(angles, dtype=q_and_k[0].dtype)
        stream = Stream(*q_and_k, norms, table)
        head_dim = stream.q.shape[-1] // attn.heads
        qkv = prologue([stream], head_dim, interleaved=False, rounding="eager")
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None, :]
        return attn.to_out[0](self.dispatch(*qkv, mask))


class OmniGen(StandIn):
    """OmniGen: no norms; its attention has a width for another stream, which is its own."""

    says_cross = False

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Return the tokens after self-attention."""
        x = hidden_states
        self.check_call(x)
        if encoder_hidden_states is not x:
            raise UnknownCallError("it is cross-attention")
        table = full_width(*full_width_by_token(image_rotary_emb, x))
        stream = Stream(*projected(attn, x), None, table)
        qkv = prologue([stream], stream.q.shape[-1] // attn.heads, interleaved=False)
        q, k, v = (each.transpose(1, 2) for each in qkv)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask)
        return attn.to_out[0](y.transpose(1, 2).reshape(*x.shape[:2], attn.out_dim))


class CogView4(StandIn):
    """CogView 4: norms stay as they are; the image's q and k are rotated in place."""

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Return the image's tokens and the text's."""
        x, text = hidden_states, encoder_hidden_states
        q, k, v = (each.transpose(1, 2) for each in self.by_head(attn, x, text, image_rotary_emb))
        mask = joint_mask(attention_mask, x, text)
        mask = None if mask is None else mask.to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        y = attn.to_out[1](attn.to_out[0](y))
        return y[:, text.shape[1] :], y[:, : text.shape[1]]

    def by_head(self, attn: Any, x: Any, text: Any, freqs: Any) -> tuple[torch.Tensor, ...]:
        """Return q, k and v of text and image, (b, s, heads, d)."""
        self.check_call(x)
        table = full_width(*full_width_by_token(freqs, x))
        both = torch.cat([text, x], dim=1)
        head_dim = attn.inner_dim // attn.heads
        q, k, v = (by_head(each, head_dim) for each in projected(attn, both))
        q = q if attn.norm_q is None else attn.norm_q(q).to(text.dtype)
        k = k if attn.norm_k is None else attn.norm_k(k).to(text.dtype)
        q, k = rotate_behind(q, k, text.shape[1], table, interleaved=False)
        return q, k, v


class GlmImage(CogView4):
    """GLM-Image: as CogView 4, where it has no cache."""

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
        kv_cache: Any = None,
    ) -> Any:
        """Return the image's tokens and the text's."""
        if kv_cache is not None:
            raise UnknownCallError("it has a cache")
        x, text = hidden_states, encoder_hidden_states
        q, k, v = self.by_head(attn, x, text, image_rotary_emb)
        mask = joint_mask(attention_mask, x, text)
        y = self.dispatch(q, k, v, None if mask is None else mask.to(q.dtype))
        y = attn.to_out[1](attn.to_out[0](y))
        return y[:, text.shape[1] :], y[:, : text.shape[1]]


def complex_by_token(freqs: Any, x: torch.Tensor) -> torch.Tensor:
    """Return complex numbers for each batch and token of x."""
    freqs = checked(freqs, x)
    if not freqs.is_complex() or freqs.ndim != 3:
        raise UnknownCallError("its table is not of complex numbers by batch and token")
    if freqs.shape[0] not in (1, x.shape[0]) or freqs.shape[1] != x.shape[1]:
        raise UnknownCallError("its table has another number of tokens")
    return freqs  # type: ignore[no-any-return]


def _of_angles(angles: torch.Tensor, dtype: torch.dtype) -> RotaryTable:
    cos, sin = torch.cos(angles).to(dtype).squeeze(2), torch.sin(angles).to(dtype).squeeze(2)
    return RotaryTable.from_elementwise(cos, sin)
