"""Stand-ins for the attention of video models whose q and k come from one stream of tokens."""

from __future__ import annotations

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
    full_width_of_all_heads,
    matrices,
    pair_of,
    projected,
    projected_by_one,
    prologue,
    rotate_behind,
    rotated_apart,
)
from ._diffusers_stand_in import StandIn


class Wan(StandIn):
    """Wan, its variants and SkyReels: the norm is of all heads of a token."""

    norms = Q_AND_K

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        rotary_emb: Any = None,
    ) -> Any:
        """Return the tokens after self-attention."""
        x = hidden_states
        self.check_call(x)
        if encoder_hidden_states is not None or attn.add_k_proj is not None:
            raise UnknownCallError("it is cross-attention")
        table = full_width(*full_width_of_all_heads(rotary_emb, x))
        norms = self.norms_in(attn, x.dtype)
        project = projected_by_one if attn.fused_projections else projected
        q, k, v = project(attn, x)
        qkv = prologue([Stream(q, k, v, norms, table)], q.shape[-1] // attn.heads, norm="heads")
        return attn.to_out[1](attn.to_out[0](self.dispatch(*qkv, attention_mask)))


class LTX(StandIn):
    """LTX: the norm is of all heads of a token, and each head has angles of its own."""

    norms = Q_AND_K
    cross = "attn2", "audio_attn2"

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Return the tokens after self-attention."""
        x, context = hidden_states, encoder_hidden_states
        y = self.attended(attn, x, context, attention_mask, image_rotary_emb, None, False)
        return attn.to_out[1](attn.to_out[0](y))

    def attended(
        self, attn: Any, x: Any, context: Any, mask: Any, q_freqs: Any, k_freqs: Any, split: bool
    ) -> torch.Tensor:
        """Return the attention of tokens to a context, or to themselves where it is None."""
        self.check_call(x)
        context = x if context is None else context
        tables = [self.by_head(attn, q_freqs, x, split)]
        if k_freqs is not None:
            tables.append(self.by_head(attn, k_freqs, context, split))
        elif context.shape[:2] != x.shape[:2]:
            raise UnknownCallError("q and k differ in length")
        norms = self.norms_in(attn, x.dtype)
        if mask is not None:
            batch, length = context.shape[:2]
            mask = attn.prepare_attention_mask(mask, length, batch)
            mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
        q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        head_dim = q.shape[-1] // attn.heads
        if k.shape[-1] != q.shape[-1]:
            raise UnknownCallError("q and k differ in heads")
        if len(tables) == 1:
            stream = Stream(q, k, v, norms, tables[0])
            q, k, v = prologue([stream], head_dim, not split, norm="heads")
        else:
            q, k = rotated_apart(q, k, norms, tables, head_dim, interleaved=not split)
            q, k, v = (by_head(each, head_dim) for each in (q, k, v))
        return self.dispatch(q, k, v, mask)

    def by_head(self, attn: Any, freqs: Any, x: torch.Tensor, split: bool) -> RotaryTable:
        """Return the table of the angles of each head, for the tokens of x."""
        cos, sin = pair_of(freqs, x)
        batches = 1, x.shape[0]
        if split:
            if cos.ndim != 4 or cos.shape[0] not in batches or cos.shape[2] != x.shape[1]:
                raise UnknownCallError("its table is not by head and token")
            return RotaryTable(cos.transpose(1, 2), sin.transpose(1, 2))
        if cos.ndim != 3 or cos.shape[0] not in batches or cos.shape[1] != x.shape[1]:
            raise UnknownCallError("its table is not by token")
        head_dim = cos.shape[-1] // attn.heads
        return RotaryTable.from_full_width(by_head(cos, head_dim), by_head(sin, head_dim))


class LTX2(LTX):
    """LTX-2: in attention between audio and video, k has a table of its own."""

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        query_rotary_emb: Any = None,
        key_rotary_emb: Any = None,
    ) -> Any:
        """Return the tokens after attention."""
        x, context = hidden_states, encoder_hidden_states
        tables = query_rotary_emb, key_rotary_emb
        return self.gated(attn, x, context, attention_mask, *tables)

    def gated(self, attn: Any, x: Any, context: Any, mask: Any, q_freqs: Any, k_freqs: Any) -> Any:
        """Return the tokens after attention whose heads have gates."""
        if attn.rope_type not in ("interleaved", "split"):
            raise UnknownCallError("its rope_type is not known")
        split = attn.rope_type == "split"
        y = self.attended(attn, x, context, mask, q_freqs, k_freqs, split)
        if attn.to_gate_logits is not None:
            gates = 2.0 * torch.sigmoid(attn.to_gate_logits(x))
            y = (by_head(y, y.shape[-1] // attn.heads) * gates.unsqueeze(-1)).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](y))


class LTX2Perturbed(LTX2):
    """LTX-2's attention that can be perturbed, where it is not."""

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        query_rotary_emb: Any = None,
        key_rotary_emb: Any = None,
        perturbation_mask: Any = None,
        all_perturbed: Any = None,
    ) -> Any:
        """Return the tokens after attention."""
        if perturbation_mask is not None or all_perturbed:
            raise UnknownCallError("it is perturbed")
        x, context = hidden_states, encoder_hidden_states
        tables = query_rotary_emb, key_rotary_emb
        return self.gated(attn, x, context, attention_mask, *tables)


class CogVideoX(StandIn):
    """CogVideoX and ConsisID: norms stay as they are; the video's q and k are rotated in place."""

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Return the video's tokens and the text's."""
        x, text, mask = hidden_states, encoder_hidden_states, attention_mask
        self.check_call(x)
        table = full_width(*full_width_by_token(image_rotary_emb, x))
        if attn.is_cross_attention:
            raise UnknownCallError("it is cross-attention")
        both = torch.cat([text, x], dim=1)
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, both.shape[1], both.shape[0])
            mask = mask.view(both.shape[0], attn.heads, -1, mask.shape[-1])
        head_dim, length = attn.inner_dim // attn.heads, text.shape[1]
        q, k, v = (by_head(each, head_dim) for each in self.project(attn, both))
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        q, k = rotate_behind(q, k, length, table, interleaved=True)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        y = attn.to_out[1](attn.to_out[0](y))
        return y[:, length:], y[:, :length]

    def project(self, attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return q, k and v."""
        return projected(attn, x)


class FusedCogVideoX(CogVideoX):
    """CogVideoX with its projections fused."""

    def project(self, attn: Any, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return q, k and v."""
        return projected_by_one(attn, x)


class Cosmos(StandIn):
    """Cosmos: halves of each head are rotated."""

    norms = Q_AND_K

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        image_rotary_emb: Any = None,
    ) -> Any:
        """Return the tokens after self-attention."""
        x = hidden_states
        self.check_call(x)
        if encoder_hidden_states is not None:
            raise UnknownCallError("it is cross-attention")
        table = full_width(*full_width_by_token(image_rotary_emb, x))
        stream = Stream(*projected(attn, x), self.norms_in(attn, x.dtype), table)
        head_dim = stream.q.shape[-1] // attn.heads
        if stream.norms is None or stream.k.shape[-1] // attn.heads != head_dim:
            raise UnknownCallError("it has no norm, or heads of another size")
        qkv = prologue([stream], head_dim, interleaved=False)
        return attn.to_out[1](attn.to_out[0](self.dispatch(*qkv, attention_mask)))


class Kandinsky5(StandIn):
    """Kandinsky 5: the norm is computed in float32, and the table is of matrices."""

    norms = "query_norm", "key_norm"
    cross = ("cross_attention",)

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        rotary_emb: Any = None,
        sparse_params: Any = None,
    ) -> Any:
        """Return the tokens after self-attention."""
        x = hidden_states
        self.check_call(x)
        if encoder_hidden_states is not None or sparse_params is not None:
            raise UnknownCallError("it is cross-attention, or sparse")
        if x.dtype != torch.bfloat16:
            raise UnknownCallError("it is rounded to bfloat16 on its way")
        freqs = checked(rotary_emb, x)
        batched = freqs.ndim == 6
        if freqs.ndim not in (5, 6) or freqs.shape[-2:] != (2, 2) or freqs.shape[-4] != 1:
            raise UnknownCallError("its table is not of matrices by token")
        if freqs.shape[batched] != x.shape[1] or (batched and freqs.shape[0] not in (1, len(x))):
            raise UnknownCallError("its table has another number of tokens")
        norms, table = self.norms_in(attn, None, *self.norms), matrices(freqs)
        stream = Stream(attn.to_query(x), attn.to_key(x), attn.to_value(x), norms, table)
        qkv = prologue([stream], stream.q.shape[-1] // attn.num_heads)
        return attn.out_layer(self.dispatch(*qkv, None))


class SanaVideo(StandIn):
    """Sana-Video's linear attention, which uses q and k before the rotation, too."""

    def attend(
        self,
        attn: Any,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        rotary_emb: Any = None,
    ) -> Any:
        """Return the tokens after self-attention."""
        x = hidden_states
        self.check_call(x)
        if encoder_hidden_states is not None:
            raise UnknownCallError("it is cross-attention")
        table = full_width(*full_width_of_all_heads(rotary_emb, x))
        q, k, v = projected(attn, x)
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        q, k, v = (by_head(each, each.shape[-1] // attn.heads) for each in (q, k, v))
        q, k = F.relu(q), F.relu(k)
        stream = Stream(q.flatten(2), k.flatten(2), v.flatten(2), None, table)
        q_rotated, k_rotated, _ = prologue([stream], q.shape[-1])
        q, k, v, q_rotated, k_rotated = (
            each.permute(0, 2, 3, 1) for each in (q, k, v, q_rotated, k_rotated)
        )
        shares = 1 / (k.sum(dim=-1, keepdim=True).transpose(-2, -1) @ q + 1e-15)
        scores = torch.matmul(v.float(), k_rotated.float().transpose(-1, -2))
        y = torch.matmul(scores, q_rotated.float()) * shares
        y = y.flatten(1, 2).transpose(1, 2).to(x.dtype)
        return attn.to_out[1](attn.to_out[0](y))
