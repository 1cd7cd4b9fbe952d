"""FP8 weights for serving: rounded as the format says, and read by vLLM as they were meant."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import VOCAB_SIZE, save_qwen2
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from checkpoints_conversion.families import FAMILIES
from checkpoints_conversion.fp8 import (
    BLOCK,
    SCHEMES,
    dequantize,
    fused_with,
    is_quantized,
    largest_magnitude,
    quantization_config,
    quantize_blocks,
    quantize_rows,
    scale_name,
    scale_of,
    scale_shape,
)
from checkpoints_conversion.mapping import QKV, GateUp, Row, Sizes
from megatron_nft.policy import host

SHAPES = [(256, 384), (200, 300), (128, 1), (1, 129), (3, 4200)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SIZES = Sizes(
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab=67,
    hidden=32,
    ffn=48,
    num_experts=3,
)
PROMPT = [(7 * i) % VOCAB_SIZE for i in range(100)]

# the format, from its bits: sign, 4 of exponent (bias 7), 3 of mantissa; 0x7f is NaN, none infinite


def _value(code: int) -> float:
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return mantissa * 2.0**-9
    return (8 + mantissa) * 2.0 ** (exponent - 10)


MAGNITUDES = np.array([_value(code) for code in range(0x7F)])


def _nearest(number: np.float32) -> int:
    """The code of the nearest number of the format; of two, the one with an even code."""
    gaps = np.abs(MAGNITUDES - abs(float(number)))
    nearest = np.flatnonzero(gaps == gaps.min())
    code = int(nearest[0] if len(nearest) == 1 else nearest[nearest % 2 == 0][0])
    return code | (0x80 if np.signbit(number) else 0)


def _quantize_block(block: np.ndarray) -> tuple[np.ndarray, np.float32]:
    largest = np.abs(block).max()
    scale = np.float32(largest) / np.float32(448) if largest > 0 else np.float32(1)
    codes = [[_nearest(number / scale) for number in row] for row in block]
    return np.array(codes, np.uint8), scale


def _quantize(weight: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales, block by block and number by number."""
    codes = np.zeros(weight.shape, np.uint8)
    scales = np.zeros([-(-n // size) for n in weight.shape], np.float32)
    for i, j in np.ndindex(scales.shape):
        block = np.s_[i * size : (i + 1) * size, j * size : (j + 1) * size]
        codes[block], scales[i, j] = _quantize_block(weight[block])
    return codes, scales


def _half_steps(numbers: Tensor) -> Tensor:
    """Half the distance between the format's neighbours at these magnitudes (float64)."""
    exponents = numbers.abs().clamp(min=2.0**-6).log2().floor()
    return 2.0 ** (exponents - 3) / 2


def _random(shape: tuple[int, ...], dtype: torch.dtype, magnitude: float = 1.0) -> Tensor:
    """Numbers over six decades, some of them zero."""
    torch.manual_seed(0)
    numbers = torch.randn(shape) * 10.0 ** torch.empty(shape).uniform_(-6, 0)
    return (magnitude * numbers * (torch.rand(shape) > 0.02)).to(dtype)


def _codes(weight: Tensor) -> np.ndarray:
    return weight.view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_number_of_a_block_is_rounded_to_the_nearest(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    rows = _random(shape, dtype)
    weight, scale = quantize_blocks(rows)
    codes, scales = _quantize(rows.float().numpy(), BLOCK)
    assert scale.dtype == torch.float32
    assert tuple(scale.shape) == scale_shape(shape, "block") == scales.shape
    np.testing.assert_array_equal(scale, scales)
    np.testing.assert_array_equal(_codes(weight), codes)


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_number_moves_by_more_than_half_a_step(
    scheme: str, dtype: torch.dtype, magnitude: float
) -> None:
    rows = _random((200, 300), dtype, magnitude)
    weight, scale = _quantized(rows, scheme)
    unit = dequantize(torch.ones(rows.shape), scale).double()
    numbers, served = rows.double() / unit, dequantize(weight, scale).double() / unit
    rounding = 2.0**-23 * numbers.abs()  # half of it by the division, half by the product
    assert ((served - numbers).abs() <= _half_steps(numbers) + rounding).all()


def _quantized(rows: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    if scheme == "block":
        return quantize_blocks(rows)
    scale = scale_of(largest_magnitude(rows))
    return quantize_rows(rows, scale), scale


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_whole_weight_is_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    rows = _random((150, 40), dtype)
    weight, scale = _quantized(rows, "tensor")
    codes, scales = _quantize(rows.float().numpy(), 1000)
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, scale_shape(rows.shape, "tensor"))
    assert scale == scales.item()
    np.testing.assert_array_equal(_codes(weight), codes)


def test_pieces_make_the_whole() -> None:
    rows = _random((600, 200), torch.bfloat16)
    pieces = [quantize_blocks(piece) for piece in rows.split(256)]
    weights, scales = zip(*pieces, strict=True)
    whole, whole_scales = quantize_blocks(rows)
    np.testing.assert_array_equal(np.concatenate([_codes(w) for w in weights]), _codes(whole))
    assert torch.equal(torch.cat(scales), whole_scales)

    largest = torch.stack([largest_magnitude(piece) for piece in rows.split(256)]).max()
    scale = scale_of(largest)
    parts = np.concatenate([_codes(quantize_rows(piece, scale)) for piece in rows.split(256)])
    np.testing.assert_array_equal(parts, _codes(_quantized(rows, "tensor")[0]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zero_and_have_the_scale_one(scheme: str) -> None:
    weight, scale = _quantized(torch.zeros(130, 4), scheme)
    assert (scale == 1).all()
    assert not dequantize(weight, scale).any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_scale_is_subnormal(scheme: str) -> None:
    rows = torch.tensor([[1e-44, -1e-40, 1e-36, -3e-36]])
    weight, scale = _quantized(rows, scheme)
    assert (scale == torch.finfo(torch.float32).tiny).all()
    assert ((dequantize(weight, scale) - rows).abs() <= scale * 16).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_are_not_finite_become_nan_and_leave_their_block_alone(
    scheme: str, dtype: torch.dtype
) -> None:
    rows = _random((256, 256), dtype)
    broken = rows.clone()
    broken[[3, 140, 200], [7, 9, 250]] = torch.tensor([torch.nan, torch.inf, -torch.inf]).to(dtype)
    rows[[3, 140, 200], [7, 9, 250]] = 0
    (weight, scale), (finite, its_scale) = _quantized(broken, scheme), _quantized(rows, scheme)
    assert torch.equal(scale, its_scale)
    served = dequantize(weight, scale)
    assert torch.equal(served.isnan(), ~broken.isfinite())
    assert torch.equal(served.nan_to_num(nan=0.0), dequantize(finite, its_scale))


def test_a_block_without_finite_numbers_has_the_scale_one() -> None:
    weight, scale = quantize_blocks(torch.full((2, 2), torch.inf))
    assert scale.item() == 1
    assert dequantize(weight, scale).isnan().all()


def test_what_a_scale_is_too_small_for_is_the_largest_number() -> None:
    rows = torch.tensor([[448.0, 448.0001, 480.0, -1e6]])
    served = quantize_rows(rows, torch.tensor(1.0)).float()
    assert served.tolist() == [[448, 448, 448, -448]]


def test_transformers_dequantizes_alike() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scale = quantize_blocks(_random((256, 384), torch.bfloat16))
    theirs = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(dequantize(weight, scale), theirs)


# names


@pytest.mark.parametrize("architecture", FAMILIES)
def test_projections_alone_are_quantized(architecture: str) -> None:
    """By the kind and the shape of the name tables' rows, not by their names."""
    for mapping in FAMILIES[architecture].mappings(Qwen2Config(tie_word_embeddings=False)):
        is_projection = isinstance(mapping, QKV | GateUp | Row) and len(mapping.shapes[0]) == 2
        for _, names in mapping.names(SIZES):
            for name in names:
                assert is_quantized(name) == is_projection, name
                assert not is_projection or fused_with(name) == names


def test_scales_are_named_as_vllm_names_them() -> None:
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    assert scale_name(name, "block") == name + "_scale_inv"
    assert scale_name(name, "tensor") == name + "_scale"


def _names(architecture: str) -> list[str]:
    mappings = FAMILIES[architecture].mappings(Qwen2Config(tie_word_embeddings=True))
    return [name for mapping in mappings for _, names in mapping.names(SIZES) for name in names]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("architecture", FAMILIES)
def test_vllm_reads_the_configuration(architecture: str, scheme: str) -> None:
    from vllm.model_executor.layers.quantization.fp8 import Fp8Config
    from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

    names = _names(architecture)
    config = Fp8Config.from_config(quantization_config(scheme, names))
    assert config.weight_block_size == ([BLOCK, BLOCK] if scheme == "block" else None)
    assert (config.is_checkpoint_fp8_serialized, config.activation_scheme) == (True, "dynamic")
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    for name in names:
        module = name.rpartition(".")[0]
        assert name.endswith(".bias") or is_quantized(name) != is_layer_skipped(
            module, config.ignored_layers, fused
        )
    layer = "model.layers.1."
    for module in ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.experts"):
        assert not is_layer_skipped(layer + module, config.ignored_layers, fused)


def test_transformers_reads_the_configuration() -> None:
    """It makes FP8 of the very weights that are quantized; not of a tied head."""
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
    names = [name for name, _ in model.named_parameters()]
    config = FineGrainedFP8Config(**quantization_config("block", names))
    skipped = config.modules_to_not_convert
    model = replace_with_fp8_linear(model, skipped, config, pre_quantized=True)
    state = model.state_dict()
    fp8 = {name for name, tensor in state.items() if tensor.dtype == torch.float8_e4m3fn}
    assert fp8 == {name for name in names if is_quantized(name)}
    scales = {name: tuple(t.shape) for name, t in state.items() if name.endswith("_scale_inv")}
    assert scales == {
        scale_name(name, "block"): scale_shape(state[name].shape, "block") for name in fp8
    }
    per_tensor = FineGrainedFP8Config(**quantization_config("tensor", names))
    assert per_tensor.weight_block_size is None


# vLLM

REFUSALS = (
    "Failed to find a kernel that can implement the ScaledMM linear layer",  # block, without AMX
    "_C::static_scaled_fp8_quant() expected at most 0 argument(s)",  # tensor, on any CPU
    "expected scalar type Float but found BFloat16",  # with AMX, where a layer has a bias
)


@pytest.mark.processes
@pytest.mark.alone
@pytest.mark.parametrize("scheme", SCHEMES)
def test_vllm_computes_with_the_weights_that_the_export_stands_for(
    tmp_path: Path, scheme: str
) -> None:
    """Rounding activations as well, as most of its kernels do, must cost no more than twice what
    rounding the weights has cost. On a host that vLLM has no kernels for, it loads the export all
    the same and is lent a product; that its own is not tested is then the reason of a skip.
    """
    original, served = _save(tmp_path, scheme)
    [(refusal, logp)] = run(_serve, 1, str(tmp_path))
    expected = _logp(tmp_path, served)
    cost = _distance(_logp(tmp_path, original), expected)
    assert 0 < _distance(torch.tensor(logp), expected) <= 2 * cost
    if refusal is not None:
        pytest.skip(f"with a product of torch instead of vLLM's it agrees; vLLM: {refusal}")


def _save(path: Path, scheme: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A toy's FP8 export; the weights that it was made from and those that it stands for."""
    save_qwen2(path, hidden_size=256, intermediate_size=384)  # heads of 64, 128 rows of keys
    original = load_file(path / "model.safetensors")
    for name, weight in original.items():
        original[name] = _uneven(weight) if is_quantized(name) else weight.bfloat16().float()
    served, file = dict(original), {}
    for name, weight in original.items():
        if not is_quantized(name):
            file[name] = weight.bfloat16()
            continue
        file[name], scale = _quantized_with(name, original, scheme)
        file[scale_name(name, scheme)] = scale
        served[name] = dequantize(file[name], scale)
    save_file(file, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = quantization_config(scheme, original)
    (path / "config.json").write_text(json.dumps(config))
    return original, served


def _uneven(weight: Tensor) -> Tensor:
    """Blocks of unlike magnitude, so that a scale in another's place would be far off."""
    factors = 2.0 ** torch.randint(-2, 2, scale_shape(weight.shape, "block"))
    return dequantize(weight, factors)


def _quantized_with(name: str, weights: dict[str, Tensor], scheme: str) -> tuple[Tensor, Tensor]:
    if scheme == "block":
        return quantize_blocks(weights[name])
    scale = scale_of(torch.stack([largest_magnitude(weights[n]) for n in fused_with(name)]).max())
    return quantize_rows(weights[name], scale), scale


def _logp(path: Path, weights: dict[str, Tensor]) -> Tensor:
    """Of every token of the prompt but the first, by transformers' model in float32."""
    config = AutoConfig.from_pretrained(path)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(weights)
    tokens = torch.tensor([PROMPT])
    with torch.no_grad():
        logp = model(tokens).logits.log_softmax(-1)
    return logp[0, :-1].gather(1, tokens[0, 1:, None])[:, 0]


def _distance(logp: Tensor, other: Tensor) -> float:
    return (logp - other).square().mean().sqrt().item()


def _serve(path: str) -> tuple[str | None, list[float]]:
    """Why vLLM's own kernels do not run here, if so, and the prompt's log-probabilities."""
    os.environ |= host.vllm_environment(1)
    dist.init_process_group(host.backend())
    try:
        return None, _prompt_logp(_start(path))
    except (RuntimeError, ValueError) as error:
        refusal = str(error)
        if not any(known in refusal for known in REFUSALS):
            raise
    _lend_products()
    return refusal, _prompt_logp(_start(path))


def _prompt_logp(llm: Any) -> list[float]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    [output] = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    found = zip(output.prompt_logprobs[1:], PROMPT[1:], strict=True)
    return [logprobs[token].logprob for logprobs, token in found]


def _start(path: str) -> Any:
    from vllm import LLM  # after its environment is set

    return LLM(
        model=path,
        dtype="bfloat16",  # vLLM: FP8 beside bfloat16 or float16 alone
        distributed_executor_backend="external_launcher",
        max_model_len=128,
        max_num_seqs=8,
        skip_tokenizer_init=True,
        enforce_eager=True,
        **host.vllm_options(128),
    )


def _lend_products() -> None:
    """What vLLM's build for CPU hosts lacks; its loader stays its own."""
    from vllm import _custom_ops
    from vllm.model_executor.kernels.linear import (
        _POSSIBLE_FP8_BLOCK_KERNELS,
        _POSSIBLE_FP8_KERNELS,
        PlatformEnum,
    )
    from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel

    class Product(CPUFp8BlockScaledMMKernel):
        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None: ...

        def apply_weights(
            self, layer: torch.nn.Module, x: Tensor, bias: Tensor | None = None
        ) -> Tensor:
            weight = dequantize(layer.weight, layer.weight_scale_inv)
            return F.linear(x, weight.to(x.dtype), bias)

    _POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].insert(0, Product)
    per_tensor = _POSSIBLE_FP8_KERNELS[PlatformEnum.CPU]  # with AMX, refused where there is a bias
    per_tensor[:] = [k for k in per_tensor if not k.__name__.startswith("CPUFp8PerTensor")]
    _custom_ops.scaled_fp8_quant = lambda rows, scale: (quantize_rows(rows, scale), scale)
