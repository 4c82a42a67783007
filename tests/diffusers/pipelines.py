"""The pipelines that diffusers ships, around tiny random networks built from their own configs.

    tiny = pipelines["sdxl"]()
    latents = tiny(steps=5)                        # the pipeline's own loop
    assert tiny.calls == 5                         # counted inside the network

Nothing is downloaded. Weights are random with a fixed seed; their outputs are of order 1 and
smooth, so that two solvers that are the same agree to rounding. `ddpm` is different: its network is
the bundled digits model, and its pictures are digits.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers as hf
import numpy as np
import torch
import transformers
from torch import Tensor, nn

from fewstep.diffusers import BundledUNet

WORDS = ("a", "cat", "dog", "house", "in", "the", "snow", "red", "blue", "of")
SCALED_LINEAR: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
LINEAR: dict[str, Any] = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


@dataclass
class Tiny:
    """A pipeline, the arguments of its calls, and a count of its network's calls.

    per_step: network calls of one step (2 where the pipeline guides with two calls, not a batch).
    """

    pipe: Any
    call: dict[str, Any]
    network: nn.Module
    per_step: int = 1
    calls: int = field(default=0, init=False)
    times: list[float] = field(default_factory=list, init=False)  # what the network was told

    def __post_init__(self) -> None:
        self.pipe.set_progress_bar_config(disable=True)
        self.network.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.calls += 1
        time = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.times.append(float(torch.as_tensor(time).flatten()[0]))

    def __call__(self, steps: int = 5, seed: int = 0, **changes: Any) -> Tensor:
        """The pipeline's result as a tensor, from a generator of this seed."""
        self.calls, self.times = 0, []
        generator = torch.Generator().manual_seed(seed)
        call = {"num_inference_steps": steps, "generator": generator, **self.call, **changes}
        result = self.pipe(**call)[0]
        if isinstance(result, np.ndarray):  # pictures, with their channels last
            return torch.from_numpy(result).movedim(-1, 1)
        return result

    def scheduled(self, scheduler: Any) -> Tiny:
        """The same pipeline object with this scheduler."""
        self.pipe.scheduler = scheduler
        return self


def _seeded(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _picture() -> Tensor:
    """A smooth picture in [0, 1]."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, (32, 32), mode="bilinear")


def _random(build: Callable[..., Any], **config: Any) -> Any:
    torch.manual_seed(0)
    return build(**config).eval().requires_grad_(False)


def _image_vae(**config: Any) -> Any:
    return _random(
        hf.AutoencoderKL,
        block_out_channels=[4, 4],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
        force_upcast=False,
        **config,
    )


def _tokenizer() -> Any:
    """A CLIP tokenizer of a dozen words; anything else is its unknown token."""
    ends = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = [*ends, *(f"{word}</w>" for word in WORDS)]
    letters = sorted({letter for word in WORDS for letter in word})
    vocabulary += [*letters, *(f"{letter}</w>" for letter in letters)]
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts = [parts[0] + parts[1], *parts[2:]]
            vocabulary.append(parts[0])
    numbers = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    lines = ["#version: 0.2", *dict.fromkeys(f"{left} {right}" for left, right in merges)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps(numbers))
        (Path(folder) / "merges.txt").write_text("\n".join(lines) + "\n")
        return transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def _text_encoder(build: Any, width: int) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=width,
        projection_dim=width,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        vocab_size=128,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return _random(build, config=config)


def sd(build: Any = hf.StableDiffusionPipeline, **call: Any) -> Tiny:
    unet = _random(
        hf.UNet2DConditionModel,
        block_out_channels=(4, 8),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=2,
    )
    pipe = build(
        unet=unet,
        vae=_image_vae(),
        text_encoder=_text_encoder(transformers.CLIPTextModel, 8),
        tokenizer=_tokenizer(),
        scheduler=hf.DDIMScheduler(**SCALED_LINEAR, clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    call = {"prompt": "a red cat", "guidance_scale": 5.0, "output_type": "latent", **call}
    return Tiny(pipe, call, unet)


def sd_img2img() -> Tiny:
    return sd(hf.StableDiffusionImg2ImgPipeline, image=_picture(), strength=0.6)


def sdxl(build: Any = hf.StableDiffusionXLPipeline, call: Any = None, **parts: Any) -> Tiny:
    config: dict[str, Any] = {
        "block_out_channels": (4, 8),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "attention_head_dim": (2, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "transformer_layers_per_block": (1, 1),
        "projection_class_embeddings_input_dim": 6 * 8 + 8,
        "cross_attention_dim": 16,
        "norm_num_groups": 2,
    }
    unet = _random(
        hf.UNet2DConditionModel,
        sample_size=16,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **config,
    )
    if build is hf.StableDiffusionXLControlNetPipeline:
        parts["controlnet"] = _random(
            hf.ControlNetModel, conditioning_embedding_out_channels=(4, 8), **config
        )
    pipe = build(
        unet=unet,
        vae=_image_vae(),
        text_encoder=_text_encoder(transformers.CLIPTextModel, 8),
        tokenizer=_tokenizer(),
        text_encoder_2=_text_encoder(transformers.CLIPTextModelWithProjection, 8),
        tokenizer_2=_tokenizer(),
        scheduler=hf.EulerDiscreteScheduler(**SCALED_LINEAR, timestep_spacing="leading"),
        add_watermarker=False,
        **parts,
    )
    call = {"prompt": "a red cat", "guidance_scale": 5.0, "output_type": "latent", **(call or {})}
    return Tiny(pipe, call, unet)


def sdxl_img2img() -> Tiny:
    call = {"image": _picture(), "strength": 0.6}
    return sdxl(hf.StableDiffusionXLImg2ImgPipeline, call)


def sdxl_inpaint() -> Tiny:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 16:] = 1
    call = {"image": _picture(), "mask_image": mask, "strength": 0.6, "height": 32, "width": 32}
    return sdxl(hf.StableDiffusionXLInpaintPipeline, call)


def sdxl_controlnet() -> Tiny:
    tiny = sdxl(hf.StableDiffusionXLControlNetPipeline, {"image": _picture()})
    # a ControlNet begins as nothing: its last layers are zero
    torch.manual_seed(1)
    for block in [
        *tiny.pipe.controlnet.controlnet_down_blocks,
        tiny.pipe.controlnet.controlnet_mid_block,
    ]:
        nn.init.normal_(block.weight, std=0.1)
    return tiny


def sd3() -> Tiny:
    transformer = _random(
        hf.SD3Transformer2DModel,
        sample_size=16,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=16,
    )
    pipe = hf.StableDiffusion3Pipeline(
        transformer=transformer,
        vae=_image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609),
        scheduler=hf.FlowMatchEulerDiscreteScheduler(shift=3.0),
        **dict.fromkeys(
            f"{part}{number}"
            for part in ("text_encoder", "tokenizer")
            for number in ("", "_2", "_3")
        ),
    )
    call = {
        "prompt_embeds": _seeded(2, 1, 4, 16),
        "negative_prompt_embeds": _seeded(3, 1, 4, 16),
        "pooled_prompt_embeds": _seeded(4, 1, 16),
        "negative_pooled_prompt_embeds": _seeded(5, 1, 16),
        "guidance_scale": 5.0,
        "output_type": "latent",
    }
    return Tiny(pipe, call, transformer)


def flux() -> Tiny:
    transformer = _random(
        hf.FluxTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[2, 2, 4],
        guidance_embeds=True,
    )
    pipe = hf.FluxPipeline(
        transformer=transformer,
        vae=_image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609),
        scheduler=hf.FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=1.15,
        ),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    )
    call = {
        "prompt_embeds": _seeded(2, 1, 4, 16),
        "pooled_prompt_embeds": _seeded(3, 1, 16),
        "height": 32,
        "width": 32,
        "output_type": "latent",
    }
    return Tiny(pipe, call, transformer)


def pixart_sigma() -> Tiny:
    transformer = _random(
        hf.PixArtTransformer2DModel,
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )
    pipe = hf.PixArtSigmaPipeline(
        transformer=transformer,
        vae=_image_vae(),
        text_encoder=None,
        tokenizer=None,
        scheduler=hf.DPMSolverMultistepScheduler(**LINEAR),
    )
    call = {
        "prompt_embeds": _seeded(2, 1, 4, 16),
        "negative_prompt_embeds": _seeded(3, 1, 4, 16),
        "prompt_attention_mask": torch.ones(1, 4),
        "negative_prompt_attention_mask": torch.ones(1, 4),
        "negative_prompt": None,
        "guidance_scale": 4.5,
        "use_resolution_binning": False,
        "output_type": "latent",
    }
    return Tiny(pipe, call, transformer)


def sana() -> Tiny:
    transformer = _random(
        hf.SanaTransformer2DModel,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )
    blocks = {"block_types": ("ResBlock", "ResBlock"), "block_out_channels": (4, 4)}
    vae = _random(
        hf.AutoencoderDC,
        in_channels=3,
        latent_channels=4,
        attention_head_dim=2,
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        **{
            f"{side}_{key}": value
            for key, value in blocks.items()
            for side in ("encoder", "decoder")
        },
    )
    pipe = hf.SanaPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        scheduler=hf.DPMSolverMultistepScheduler(
            use_flow_sigmas=True,
            flow_shift=3.0,
            prediction_type="flow_prediction",
        ),
    )
    call = {
        "prompt_embeds": _seeded(2, 1, 4, 8),
        "negative_prompt_embeds": _seeded(3, 1, 4, 8),
        "prompt_attention_mask": torch.ones(1, 4),
        "negative_prompt_attention_mask": torch.ones(1, 4),
        "negative_prompt": None,
        "height": 32,
        "width": 32,
        "use_resolution_binning": False,
        "output_type": "latent",
    }
    return Tiny(pipe, call, transformer)


def wan() -> Tiny:
    transformer = _random(
        hf.WanTransformer3DModel,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    vae = _random(
        hf.AutoencoderKLWan,
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipe = hf.WanPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        scheduler=hf.UniPCMultistepScheduler(
            use_flow_sigmas=True,
            flow_shift=3.0,
            prediction_type="flow_prediction",
        ),
    )
    call = {
        "prompt_embeds": _seeded(2, 1, 4, 16),
        "negative_prompt_embeds": _seeded(3, 1, 4, 16),
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "output_type": "latent",
    }
    return Tiny(pipe, call, transformer, per_step=2)


def ltx() -> Tiny:
    transformer = _random(
        hf.LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    vae = _random(
        hf.AutoencoderKLLTXVideo,
        latent_channels=8,
        block_out_channels=(4, 4, 4, 4),
        decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    pipe = hf.LTXPipeline(
        transformer=transformer,
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        scheduler=hf.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            shift_terminal=0.1,
        ),
    )
    call = {
        "prompt_embeds": _seeded(2, 1, 4, 16),
        "negative_prompt_embeds": _seeded(3, 1, 4, 16),
        "prompt_attention_mask": torch.ones(1, 4),
        "negative_prompt_attention_mask": torch.ones(1, 4),
        "height": 32,
        "width": 32,
        "num_frames": 9,
        "output_type": "latent",
    }
    return Tiny(pipe, call, transformer)


def stable_audio() -> Tiny:
    transformer = _random(
        hf.StableAudioDiTModel,
        sample_size=16,
        in_channels=3,
        out_channels=3,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        num_key_value_attention_heads=2,
        cross_attention_dim=4,
        time_proj_dim=8,
        global_states_input_dim=8,
        cross_attention_input_dim=4,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm`", FutureWarning)
        vae = _random(
            hf.AutoencoderOobleck,
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=3,
            decoder_input_channels=3,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=4,
        )
    projection = _random(
        hf.StableAudioProjectionModel,
        text_encoder_dim=4,
        conditioning_dim=4,
        min_value=0,
        max_value=32,
    )
    pipe = hf.StableAudioPipeline(
        transformer=transformer,
        vae=vae,
        projection_model=projection,
        text_encoder=None,
        tokenizer=None,
        scheduler=hf.EDMDPMSolverMultistepScheduler(
            sigma_min=0.3,
            sigma_max=500.0,
            sigma_data=1.0,
            sigma_schedule="exponential",
            prediction_type="v_prediction",
        ),
    )
    call = {
        "prompt_embeds": _seeded(2, 1, 4, 4),
        "negative_prompt_embeds": _seeded(3, 1, 4, 4),
        "output_type": "latent",
    }
    return Tiny(pipe, call, transformer)


def kandinsky22() -> Tiny:
    unet = _random(
        hf.UNet2DConditionModel,
        sample_size=16,
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        encoder_hid_dim=8,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=8,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )
    movq = _random(
        hf.VQModel,
        block_out_channels=[32, 32],
        down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
        latent_channels=4,
        norm_num_groups=8,
        norm_type="spatial",
        num_vq_embeddings=12,
        vq_embed_dim=4,
    )
    pipe = hf.KandinskyV22Pipeline(
        unet=unet,
        movq=movq,
        scheduler=hf.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
        ),
    )
    call = {
        "image_embeds": _seeded(2, 1, 8),
        "negative_image_embeds": _seeded(3, 1, 8),
        "height": 64,
        "width": 64,
        "output_type": "latent",
    }
    return Tiny(pipe, call, unet)


def dit() -> Tiny:
    transformer = _random(
        hf.DiTTransformer2DModel,
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    pipe = hf.DiTPipeline(
        transformer=transformer,
        vae=_image_vae(),
        scheduler=hf.DDIMScheduler(**LINEAR, clip_sample=False),
    )
    return Tiny(pipe, {"class_labels": [1], "output_type": "np"}, transformer)


class DigitsInTurn(BundledUNet):
    """Sample k of a batch is the digit k mod 10."""

    def forward(self, sample: Tensor, timestep: Any, return_dict: bool = True) -> Any:
        self.label = torch.arange(len(sample)) % 10
        return super().forward(sample, timestep, return_dict)


def ddpm() -> Tiny:
    unet = DigitsInTurn("digits", (8, 8), 1)
    pipe = hf.DDPMPipeline(unet, hf.DDPMScheduler(**LINEAR, clip_sample=False))
    return Tiny(pipe, {"batch_size": 10, "output_type": "np"}, unet)


pipelines: dict[str, Callable[[], Tiny]] = {
    build.__name__: build
    for build in (
        sd,
        sd_img2img,
        sdxl,
        sdxl_img2img,
        sdxl_inpaint,
        sdxl_controlnet,
        sd3,
        flux,
        pixart_sigma,
        sana,
        wan,
        ltx,
        stable_audio,
        kandinsky22,
        dit,
        ddpm,
    )
}
