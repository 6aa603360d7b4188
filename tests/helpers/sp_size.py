"""How a Trainer is told to cut sequences by accelerate's `sp_size` and DeepSpeed's data loader."""


def cut_in_two(stage, bf16=False):
    """Settings of TrainingArguments for two ranks, whose optimizer is torch's own.

    Args:
        stage: of ZeRO.
    """
    from accelerate import ParallelismConfig
    from accelerate.utils import DeepSpeedSequenceParallelConfig

    handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
    auto = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    engine = {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
    }
    return {
        "parallelism_config": ParallelismConfig(sp_size=2, sp_backend="deepspeed", sp_handler=handler),
        "deepspeed": dict.fromkeys(auto, "auto") | engine,
        "bf16": bf16,
    }
