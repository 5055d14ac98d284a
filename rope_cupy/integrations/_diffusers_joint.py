"""Stand-ins for the attention of a text and an image together, each with projections of its own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from rope_cupy import RotaryTable

from ._diffusers_prologue import (
    Stream,
    UnknownCallError,
    by_head,
    checked,
    full_width,
    full_width_by_token,
    matrices,
    pair_of,
    projected,
    projected_by_one,
    prologue,
)
from ._diffusers_stand_in import StandIn

ADDED = "norm_added_q", "norm_added_k"
ALL_NORMS = "norm_q", "norm_k", *ADDED


class Flux(StandIn):
    """Flux, Chroma, Bria, LongCat, Ovis: the text first, and one table for both.

    A block of one stream has no text, and projects nothing behind its attention.
    """

    norms = ALL_NORMS

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Return the image's tokens and the text's, or those of one stream."""
        x, text = hidden_states, encoder_hidden_states
        y, length = self.joint(attn, x, text, attention_mask, image_rotary_emb)
        if text is None:
            return y
        image = attn.to_out[1](attn.to_out[0](y[:, length:].contiguous()))
        return image, attn.to_add_out(y[:, :length].contiguous())

    def joint(
        self, attn: Any, x: Any, text: Any, mask: Any, freqs: Any
    ) -> tuple[torch.Tensor, int]:
        """Return the attention of all tokens, and how many of them are the text's."""
        self.check_call(x)
        cos, sin = pair_of(freqs, x)
        length = 0 if text is None else text.shape[1]
        if (attn.added_kv_proj_dim is None) != (text is None):
            raise UnknownCallError("it has a text, or projections of one, without the other")
        if cos.ndim != 2 or cos.shape[0] != length + x.shape[1]:
            raise UnknownCallError("its table is not by token")
        norms = self.norms_in(attn, x.dtype)
        added = None if text is None else self.norms_in(attn, text.dtype, *ADDED)
        table = full_width(cos, sin)
        image_table = full_width(cos, sin, start=length) if length else table
        project = projected_by_one if attn.fused_projections else projected
        streams = [Stream(*project(attn, x), norms, image_table)]
        if text is not None:
            streams.insert(0, Stream(*project(attn, text, added=True), added, table))
        head_dim = getattr(attn, "head_dim", None) or streams[0].q.shape[-1] // attn.heads
        return self.dispatch(*prologue(streams, head_dim), mask), length


class Flux2(Flux):
    """Flux 2: a block of one stream projects behind its attention as well."""

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Return the image's tokens and the text's, or those of one stream."""
        x, text = hidden_states, encoder_hidden_states
        y, length = self.joint(attn, x, text, attention_mask, image_rotary_emb)
        image = attn.to_out[1](attn.to_out[0](y[:, length:]))
        return image if text is None else (image, attn.to_add_out(y[:, :length]))


class Flux2Parallel(StandIn):
    """Flux 2's blocks of one stream: q, k, v and the MLP's input come from one projection."""

    norms = "norm_q", "norm_k"

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Return the tokens of the one stream, its MLP's part included."""
        x = hidden_states
        self.check_call(x)
        table = full_width(*full_width_by_token(image_rotary_emb, x))
        norms = self.norms_in(attn, x.dtype)
        whole = attn.to_qkv_mlp_proj(x)
        attended, mlp = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
        width = whole.shape[-1] * attended // (attended + mlp)  # of a part, in tensor parallelism
        qkv, mlp_input = whole.split([width, whole.shape[-1] - width], dim=-1)
        q, k, v = qkv.chunk(3, dim=-1)
        stream = Stream(q, k, v, norms, table)
        y = self.dispatch(*prologue([stream], attn.head_dim), attention_mask)
        return attn.to_out(torch.cat([y, attn.mlp_act_fn(mlp_input)], dim=-1))


class Flux2KV(Flux2):
    """Flux 2 with a cache of the references' tokens, where it is not used."""

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
        kv_cache: Any = None,
        kv_cache_mode: Any = None,
        num_ref_tokens: Any = 0,
    ) -> Any:
        """Return the image's tokens and the text's, or those of one stream."""
        if kv_cache_mode is not None:
            raise UnknownCallError("it has a cache")
        tokens = hidden_states, encoder_hidden_states
        return super().attend(attn, *tokens, attention_mask, image_rotary_emb)


class Flux2KVParallel(Flux2Parallel):
    """Flux 2's blocks of one stream with such a cache, where it is not used."""

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
        kv_cache: Any = None,
        kv_cache_mode: Any = None,
        num_txt_tokens: Any = 0,
        num_ref_tokens: Any = 0,
    ) -> Any:
        """Return the tokens of the one stream, its MLP's part included."""
        if kv_cache_mode is not None:
            raise UnknownCallError("it has a cache")
        return super().attend(attn, hidden_states, attention_mask, image_rotary_emb)


class QwenImage(StandIn):
    """Qwen-Image, Edit and Layered: the text first, and a table of complex numbers for each."""

    norms = ALL_NORMS

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        encoder_hidden_states_mask: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Return the image's tokens and the text's."""
        x, text, mask = hidden_states, encoder_hidden_states, encoder_hidden_states_mask
        self.check_call(x)
        if text is None or attention_mask is not None:
            raise UnknownCallError("it has no text, or a mask of its own")
        if not isinstance(image_rotary_emb, tuple | list) or len(image_rotary_emb) != 2:
            raise UnknownCallError("it has no table for each of image and text")
        freqs = [checked(each, x) for each in image_rotary_emb]
        for each, tokens in zip(freqs, (x, text), strict=True):
            if not each.is_complex() or each.ndim != 2 or each.shape[0] != tokens.shape[1]:
                raise UnknownCallError("its tables are not of complex numbers by token")
        image_table, text_table = map(RotaryTable.from_complex, freqs)
        norms = self.norms_in(attn, x.dtype)
        added = self.norms_in(attn, text.dtype, *ADDED)
        streams = [
            Stream(*projected(attn, text, added=True), added, text_table),
            Stream(*projected(attn, x), norms, image_table),
        ]
        if mask is not None:
            image_mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            mask = torch.cat([mask, image_mask], dim=1)[:, None, None, :]
        qkv = prologue(streams, attn.inner_dim // attn.heads)
        y, length = self.dispatch(*qkv, mask), text.shape[1]
        image = attn.to_out[0](y[:, length:].contiguous())
        if len(attn.to_out) > 1:
            image = attn.to_out[1](image)
        return image, attn.to_add_out(y[:, :length].contiguous())


class HunyuanVideo(StandIn):
    """HunyuanVideo and HunyuanImage: the text last, normalised and not rotated.

    A block of one stream projects image and text together.
    """

    norms = ALL_NORMS

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Return the image's tokens and the text's."""
        x, text = hidden_states, encoder_hidden_states
        self.check_call(x)
        if text is None:
            raise UnknownCallError("it has no text")
        table = full_width(*full_width_by_token(image_rotary_emb, x))
        norms = self.norms_in(attn, x.dtype)
        if attn.add_q_proj is None:
            both = torch.cat([x, text], dim=1)
            streams = [Stream(*projected(attn, both), norms, table, first_row=0)]
        else:
            added = self.norms_in(attn, text.dtype, *ADDED)
            streams = [
                Stream(*projected(attn, x), norms, table),
                Stream(*projected(attn, text, added=True), added, None),
            ]
        qkv = prologue(streams, streams[0].q.shape[-1] // attn.heads)
        y = self.dispatch(*qkv, self.mask_of(attention_mask, qkv[0]))
        image, text = y[:, : x.shape[1]], y[:, x.shape[1] :]
        if getattr(attn, "to_out", None) is not None:
            image = attn.to_out[1](attn.to_out[0](image))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return image, text

    def mask_of(self, mask: Any, q: torch.Tensor) -> Any:
        """Return the mask of attention."""
        return mask


class HunyuanVideo15(HunyuanVideo):
    """HunyuanVideo 1.5: the mask is the text's, and says which tokens see each other."""

    def mask_of(self, mask: Any, q: torch.Tensor) -> Any:
        """Return the mask of attention, (b, 1, s, s), of the text's, (b, s_text)."""
        if mask is None:
            raise UnknownCallError("it has no mask")
        seen = F.pad(mask, (q.shape[1] - mask.shape[1], 0), value=True).bool()
        return seen[:, None, None, :] & seen[:, None, :, None]


class HiDream(StandIn):
    """HiDream: the text last, norms of all heads of a token, and matrices for image and text."""

    norms = "q_rms_norm", "k_rms_norm", "q_rms_norm_t", "k_rms_norm_t"

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        hidden_states_masks: Any = None,
        encoder_hidden_states: Any = None,
        image_rotary_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Return the image's tokens and the text's, or those of one stream."""
        x, text = hidden_states, None if attn.single else encoder_hidden_states
        self.check_call(x)
        mask = hidden_states_masks
        if args or kwargs:
            raise UnknownCallError("it has arguments that are not known")
        if mask is not None and (mask.dtype != x.dtype or mask.shape != x.shape[:2]):
            raise UnknownCallError("its mask is not of the image's tokens")
        freqs, length = checked(image_rotary_emb, x), x.shape[1]
        if freqs.ndim != 6 or freqs.shape[2] != 1 or freqs.shape[-2:] != (2, 2):
            raise UnknownCallError("its table is not of matrices by token")
        tokens = length + (0 if text is None else text.shape[1])
        if freqs.shape[:2] not in ((1, tokens), (x.shape[0], tokens)):
            raise UnknownCallError("its table has another number of tokens")
        norms = self.norms_in(attn, x.dtype, *self.norms[:2])
        q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        table = matrices(freqs[:, :length])
        streams = [Stream(q, k, v, norms, table)]
        if text is not None:
            added = self.norms_in(attn, text.dtype, *self.norms[2:])
            q, k, v = attn.to_q_t(text), attn.to_k_t(text), attn.to_v_t(text)
            table = matrices(freqs[:, length:tokens])
            streams.append(Stream(q, k, v, added, table))
        head_dim, rotary_dim = q.shape[-1] // attn.heads, 2 * freqs.shape[-3]
        if rotary_dim not in (head_dim, head_dim // 2):
            raise UnknownCallError("its table is of another part of a head")
        q, k, v = prologue(streams, head_dim, norm="heads")
        if mask is not None:  # k of padding is 0, before the rotation as behind it
            mask = F.pad(mask, (0, tokens - length), value=1.0)
            k = k * mask[:, :, None, None]
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if text is None:
            return attn.to_out(y)
        return attn.to_out(y[:, :length]), attn.to_out_t(y[:, length:])


class Mochi(StandIn):
    """Mochi: each head has angles of its own; of the text, the tokens that count are attended."""

    norms = ALL_NORMS

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any,
        attention_mask: Any,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Return the video's tokens and the text's."""
        x, text = hidden_states, encoder_hidden_states
        self.check_call(x)
        cos, sin = pair_of(image_rotary_emb, x)
        if cos.ndim != 3 or cos.shape[:2] != (x.shape[1], attn.heads):
            raise UnknownCallError("its table is not by token and head")
        table = RotaryTable(cos, sin, axes="sh")
        stream = Stream(*projected(attn, x), self.norms_in(attn, x.dtype), table)
        head_dim = stream.q.shape[-1] // attn.heads
        video = [each.transpose(1, 2) for each in prologue([stream], head_dim)]
        q, k, v = (by_head(each, head_dim) for each in projected(attn, text, added=True))
        q = q if attn.norm_added_q is None else attn.norm_added_q(q)
        k = k if attn.norm_added_k is None else attn.norm_added_k(k)
        added = [each.transpose(1, 2) for each in (q, k, v)]
        tokens, attended = x.shape[1] + text.shape[1], []
        for batch, mask in enumerate(attention_mask):
            counts = mask.flatten().nonzero().flatten()
            one = slice(batch, batch + 1)
            q, k, v = (
                torch.cat([of_video[one], of_text[one, :, counts]], dim=2)
                for of_video, of_text in zip(video, added, strict=True)
            )
            y = F.scaled_dot_product_attention(q, k, v)
            attended.append(F.pad(y, (0, 0, 0, tokens - y.shape[2])))
        y = torch.cat(attended).transpose(1, 2).flatten(2)
        out, text = y[:, : x.shape[1]], y[:, x.shape[1] :]
        out = attn.to_out[1](attn.to_out[0](out))
        return out, attn.to_add_out(text) if hasattr(attn, "to_add_out") else text
