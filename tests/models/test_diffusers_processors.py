"""All attention processors of diffusers: each is known to the integration, or named as left."""

import importlib
import inspect
import pkgutil

import pytest

diffusers = pytest.importorskip("diffusers")

from rope_cupy.integrations.diffusers import KNOWN  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

# Processors that no stand-in is for, by their module. Many rotate nothing.
LEFT = {
    "attention_processor": """AllegroAttnProcessor2_0 AttnAddedKVProcessor AttnAddedKVProcessor2_0
        AttnProcessor AttnProcessor2_0 AttnProcessorNPU AuraFlowAttnProcessor2_0
        CustomDiffusionAttnProcessor CustomDiffusionAttnProcessor2_0
        CustomDiffusionXFormersAttnProcessor FusedAttnProcessor2_0 FusedAuraFlowAttnProcessor2_0
        FusedHunyuanAttnProcessor2_0 FusedJointAttnProcessor2_0 HunyuanAttnProcessor2_0
        IPAdapterAttnProcessor IPAdapterAttnProcessor2_0 IPAdapterXFormersAttnProcessor
        JointAttnProcessor2_0 LuminaAttnProcessor2_0 MochiVaeAttnProcessor2_0
        PAGCFGHunyuanAttnProcessor2_0 PAGCFGIdentitySelfAttnProcessor2_0 PAGCFGJointAttnProcessor2_0
        PAGCFGSanaLinearAttnProcessor2_0 PAGHunyuanAttnProcessor2_0
        PAGIdentitySanaLinearAttnProcessor2_0 PAGIdentitySelfAttnProcessor2_0
        PAGJointAttnProcessor2_0 SD3IPAdapterJointAttnProcessor2_0 SanaLinearAttnProcessor2_0
        SanaMultiscaleAttnProcessor2_0 SlicedAttnAddedKVProcessor SlicedAttnProcessor
        StableAudioAttnProcessor2_0 XFormersAttnAddedKVProcessor XFormersAttnProcessor
        XFormersJointAttnProcessor XLAFlashAttnProcessor2_0""",
    "autoencoders.autoencoder_kl_cosmos": "CosmosSpatialAttentionProcessor2_0 "
    "CosmosTemporalAttentionProcessor2_0",
    "autoencoders.autoencoder_kl_kvae_audio": "KVAEAudioAttnProcessor",
    "autoencoders.autoencoder_kl_minimax_h3": "MiniMaxH3VideoAttnProcessor",
    "autoencoders.autoencoder_kl_minimax_h3_audio": "MiniMaxH3AudioAttnProcessor",
    "autoencoders.autoencoder_mmaudio": "MMAudioAttnProcessor",
    "autoencoders.autoencoder_rfd4_proteina": "RFD4ProteinaPairAttnProcessor",
    "autoencoders.autoencoder_same": "SAMEAttnProcessor",
    "autoencoders.ltx2_diffusion_decoder": "LTX2VideoVaeNeighborhoodAttnProcessor "
    "LTX2VideoVaeNeighborhoodNattenProcessor",
    "condition_embedders.condition_embedder_anima": "AnimaTextConditionerAttnProcessor",
    "transformers.ace_step_transformer": "AceStepAttnProcessor2_0",
    "transformers.minimax_music3_rvq_depth_decoder": "MiniMaxMusic3DepthAttnProcessor",
    "transformers.sana_transformer": "SanaAttnProcessor2_0",
    "transformers.transformer_anyflow": "AnyFlowAttnProcessor AnyFlowCrossAttnProcessor",
    "transformers.transformer_anyflow_far": "AnyFlowAttnProcessor AnyFlowCausalAttnProcessor "
    "AnyFlowCrossAttnProcessor",
    "transformers.transformer_cogview4": "CogView4TrainingAttnProcessor",
    "transformers.transformer_cosmos": "CosmosAttnProcessor2_5",
    "transformers.transformer_cosmos3": "Cosmos3AttnProcessor",
    "transformers.transformer_easyanimate": "EasyAnimateAttnProcessor2_0",
    "transformers.transformer_flux": "FluxIPAdapterAttnProcessor",
    "transformers.transformer_helios": "HeliosAttnProcessor",
    "transformers.transformer_ideogram4": "Ideogram4AttnProcessor",
    "transformers.transformer_joyimage": "JoyImageAttnProcessor",
    "transformers.transformer_joyimage_edit_plus": "JoyImageEditPlusAttnProcessor",
    "transformers.transformer_kandinsky6": "Kandinsky6AttnProcessor",
    "transformers.transformer_kandinsky6_sr": "Kandinsky6SRAttnProcessor",
    "transformers.transformer_krea2": "Krea2AttnProcessor",
    "transformers.transformer_longcat_audio_dit": "AudioDiTCrossAttnProcessor "
    "AudioDiTSelfAttnProcessor",
    "transformers.transformer_minimax_h3": "MiniMaxH3AttnProcessor",
    "transformers.transformer_minimax_music3": "MiniMaxMusic3AttnProcessor",
    "transformers.transformer_motif_video": "MotifVideoCrossAttnProcessor2_0",
    "transformers.transformer_nucleusmoe_image": "NucleusMoEAttnProcessor2_0",
    "transformers.transformer_prx": "PRXAttnProcessor2_0",
    "transformers.transformer_qwenimage21": "QwenImage21AttnProcessor QwenImage21FlexAttnProcessor",
    "transformers.transformer_rfd4_proteina": "RFD4ProteinaPairAttnProcessor",
    "transformers.transformer_sana_video": "SanaAttnProcessor2_0",
    "transformers.transformer_sana_wm": "SanaWMCrossAttnProcessor",
    "transformers.transformer_sana_wm_refiner": "SanaWMLTX2AudioVideoAttnProcessor "
    "SanaWMLTX2PerturbedAttnProcessor SanaWMLTX2RefinerAttnProcessor",
    "transformers.transformer_stable_audio3": "StableAudio3CrossAttnProcessor "
    "StableAudio3SelfAttnProcessor",
    "transformers.transformer_wan_animate": "WanAnimateFaceBlockAttnProcessor",
    "transformers.transformer_wan_animate_2": "WanAnimate2AttnProcessor "
    "WanAnimate2CrossAttnProcessor",
    "unets.unet_dreamlite": "DreamLiteAttnProcessor2_0",
}


def test_every_processor_of_diffusers_is_known_or_named_here():
    """A release that brings another one, or takes one away, must be looked at."""
    found = set()
    for each in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        for name, kind in vars(importlib.import_module(each.name)).items():
            own = inspect.isclass(kind) and kind.__module__ == each.name
            if own and "Processor" in name and "__call__" in vars(kind):
                found.add(f"{each.name}.{name}")
    left = {f"diffusers.models.{module}.{name}" for module in LEFT for name in LEFT[module].split()}
    assert found - left == {*KNOWN} and left <= found


@pytest.mark.parametrize("name", KNOWN)
def test_a_stand_in_has_the_parameters_of_the_processor(name):
    module, _, processor = name.rpartition(".")
    own = inspect.signature(getattr(importlib.import_module(module), processor).__call__)
    ours = inspect.signature(KNOWN[name].attend)
    same = [(each.name, each.kind, each.default) for each in own.parameters.values()]
    assert same == [(each.name, each.kind, each.default) for each in ours.parameters.values()]
