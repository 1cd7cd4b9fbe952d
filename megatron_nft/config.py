"""A run's configuration: frozen dataclasses, filled from a YAML recipe and `a.b=c` overrides.

Defaults are the 7B hyperparameters of the paper (arXiv 2505.18116, appendix) and its official
code. `recipe.load` fills them, `validation.validate` says what each may be. Relative paths are
relative to the working directory.
"""

from dataclasses import dataclass, field
from math import lcm

OBJECTIVE_NAMES = ("nft", "rft", "grpo", "dr_grpo", "dapo", "sft")


@dataclass(frozen=True)
class ModelConfig:
    path: str = ""  # a Hugging Face directory
    dtype: str = "bfloat16"  # bfloat16 (gradients are added up in float32) | float32
    layers: str = "auto"  # auto: Transformer Engine's where it can run | transformer_engine | torch


@dataclass(frozen=True)
class ParallelConfig:
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1  # model chunks a pipeline rank (interleaved schedule)
    context: int = 1
    expert: int = 1  # ranks that share the experts out, of those with one pipeline rank
    sequence: bool = False  # Megatron's sequence parallelism, over the tensor ranks
    distributed_optimizer: bool = True
    num_processes: int = 0  # on this machine; 0: one a GPU, or the least the layout needs

    @property
    def least_processes(self) -> int:
        """The number of processes is a multiple of it; experts' ranks may be any others' too."""
        return self.pipeline * lcm(self.tensor * self.context, self.expert)


@dataclass(frozen=True)
class MemoryConfig:
    """What is computed again or moved away so that a model fits."""

    recompute: str = "none"  # activations in backward: none | selective | full (whole layers)
    recompute_modules: list[str] = field(default_factory=lambda: ["mlp"])  # core_attn, mlp
    offload: bool = False  # gradients, optimizer: off the GPU while the engine samples


@dataclass(frozen=True)
class Fp8Config:
    """Transformer Engine's FP8 matmuls; the names are those of Megatron's TransformerConfig."""

    format: str = "off"  # off | e4m3 | hybrid (e5m2 in backward)
    recipe: str = "blockwise"  # Hopper: tensorwise, blockwise, delayed; Blackwell: mxfp8
    margin: int = 0  # delayed: bits kept free above the greatest value seen
    amax_history_len: int = 1024  # delayed
    amax_compute_algo: str = "max"  # delayed: max | most_recent
    wgrad: bool = True  # weight gradients by FP8 matmuls too
    first_last_layers_bf16: bool = False
    num_layers_at_start_in_bf16: int = 1
    num_layers_at_end_in_bf16: int = 1


@dataclass(frozen=True)
class RuleConfig:
    """How an answer is compared with the known one; see verify/rules.py."""

    name: str = "math_verify"  # math_verify | boxed_exact | numeric | module:function of your own
    last_chars: int = 300  # boxed_exact: of an answer, in which the box must lie
    tolerance: float = 1e-8  # numeric: relative to the known number; as it is where that is 0


@dataclass(frozen=True)
class SourceConfig:
    """One data file; columns that are not given are found by their usual names."""

    path: str = ""
    name: str = ""  # in metrics; default: the file's stem
    question: str = ""
    answer: str = ""
    solution: str = ""  # worked solutions, for the objective sft
    samples: int = 1  # answers a question, for evaluation sets
    rule: RuleConfig = field(default_factory=RuleConfig)


@dataclass(frozen=True)
class DataConfig:
    train: list[SourceConfig] = field(default_factory=list)
    template: str = "boxed"  # a name in templates.TEMPLATES
    max_prompt_tokens: int = 512
    on_long_prompt: str = "error"  # error | skip
    on_bad_row: str = "error"  # error | skip
    deduplicate: bool = True


@dataclass(frozen=True)
class ObjectiveConfig:
    name: str = "nft"
    # NFT, in the official code's terms
    epsilon: float = 1.0  # ε: least value of the implicit negative ratio
    omega: str = "dr_grpo"  # uniform: 1 | dr_grpo: 1−r̂ | grpo: √((1−r̂)/r̂)
    ratio: str = "token"  # token | sequence
    negative_weight: float = 1.0
    # the clipped family
    clip_low: float = 0.2
    clip_high: float = 0.2
    overlong_buffer: int = 0  # grpo, dapo: the last tokens of the length, where rewards fall
    # who divides: token_mean | sequence_mean | constant
    denominator: str = "token_mean"
    constant: float = 32000.0  # official scale: 1000 · ranks


@dataclass(frozen=True)
class RolloutConfig:
    """How answers are sampled, and which of them train; memory and lengths are an engine's."""

    engine: str = "colocated"  # in the training processes | remote: vLLM servers
    num_servers: int = 1  # remote: started by the run, `tensor` GPUs each
    servers: list[str] = field(default_factory=list)  # remote: http://HOST:PORT of running ones
    questions: int = 512  # mixed groups a rollout trains on
    questions_asked: int = 0  # at a time; 0: as many as the measured share of mixed groups needs
    max_asks: int = 10
    keep_surplus: bool = True  # groups beyond a full batch train the next, if not too old for it
    finish_fraction: float = 1.0  # of what is asked; the rest is cut off then, and asked again
    on_short_batch: str = "train"  # train | stop: when max_asks did not fill the batch
    answers: int = 16  # K
    temperature: float = 1.0
    top_p: float = 1.0
    max_response_tokens: int = 3584
    max_steps_off_policy: int = 0  # rollouts by which what samples may be older than what trains
    in_flight_updates: bool = False  # remote: answers begun under old weights go on under new ones
    weight_transfer: str = "files"  # remote: in run_dir | gloo, nccl: over the network, no file
    tensor: int = 1  # ranks an engine
    quantization: str = "none"  # none | fp8: made anew from each update
    memory_fraction: float = 0.7  # of a GPU, for vLLM
    cpu_kv_cache_gib: int = 1  # on CPU hosts
    max_sequences: int = 256  # at once, per engine
    start_timeout_s: float = 900.0  # remote: until a server must be ready
    stall_timeout_s: float = 120.0  # remote: without a token from a server that has questions
    probe_tolerance: float = 0.0  # mean |Δlogp| of the probe after an update; 0: by dtype


@dataclass(frozen=True)
class DriftConfig:
    """What to do about log-probabilities that differ between the trainer and the engine."""

    warn: float = 0.05  # mean |Δlogp| of answers sampled by the newest weights
    stop: float = 0.5
    importance_cap: float = 0.0  # truncated importance weights min(π_trainer/π_engine, cap); 0: off


@dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    warmup_rollouts: int = 10
    questions_per_minibatch: int = 32
    epochs: int = 1
    tokens_per_microbatch: int = 16384  # over the context-parallel ranks together
    max_skipped_steps: int = 3  # in a row, with a loss or gradient that is not finite


@dataclass(frozen=True)
class VerifyConfig:
    workers: int = 0  # of each engine; 0: its share of the machine's cores
    timeout_s: float = 10.0  # an answer
    memory_gib: float = 2.0  # a worker
    answers_per_worker: int = 10_000  # then it is replaced, in milliseconds
    on_bad_gold: str = "error"  # error | skip: known answers that nothing can be compared with
    max_unverifiable_rate: float = 0.1  # of a batch's answers; above it the run stops


@dataclass(frozen=True)
class EvaluateConfig:
    sets: list[SourceConfig] = field(default_factory=list)
    every: int = 2  # rollouts; 0: never
    temperature: float = 1.0
    top_p: float = 0.7
    stop_at_accuracy: float = 0.0  # end the run at this mean accuracy; 0: never


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 2  # rollouts; 0: only at the end
    keep: int = 2  # the newest
    best: str = ""  # keep the best too, by accuracy (mean of the sets) | eval/<set>/accuracy
    in_background: bool = True  # write it while the run goes on, from a copy in host memory
    check_export: bool = False  # compare the exported model's log-probabilities by transformers


@dataclass(frozen=True)
class LoggingConfig:
    tensorboard: bool = True
    answers_every: int = 0  # rollouts: what they trained on, as rollouts/rollout_N.parquet; 0: none
    wandb_project: str = ""  # empty: off
    wandb_name: str = ""


@dataclass(frozen=True)
class WatchdogConfig:
    timeout_s: float = 1800.0  # without progress of any rank until the job is ended; 0: off


@dataclass(frozen=True)
class Config:
    run_dir: str = ""
    seed: int = 0
    rollouts: int = 320
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    old_logp: str = "trainer"  # by a forward pass | rollout: the engine's own, without that pass
    drift: DriftConfig = field(default_factory=DriftConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)

    @property
    def longest(self) -> int:
        """Tokens of prompt and response together."""
        return self.data.max_prompt_tokens + self.rollout.max_response_tokens
