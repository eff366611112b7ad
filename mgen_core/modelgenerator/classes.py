"""ModelGenerator's classes and the names of their arguments: what may stand in its YAML."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..config import near
from ..errors import MgenError

Names = frozenset[str]


def words(text: str) -> Names:
    return frozenset(text.split())


# --------------------------------------------------------------------------- tasks

_ANY_TASK = words(
    "backbone batch_size data_module lr_scheduler optimizer reset_optimizer_states "
    "strict_loading use_legacy_adapter"
)
_CLASSES = _ANY_TASK | words("adapter n_classes weighted_loss")
_NUMBERS = _ANY_TASK | words("adapter log_grad_norm_step loss_func num_outputs")

# None: of arguments that we do not know. None of them counts at prediction.
TASKS: Mapping[str, Names | None] = {
    "Embed": _ANY_TASK,
    "Inference": _ANY_TASK,
    "MLM": None,
    "SequenceClassification": _CLASSES | words("multilabel"),
    "SequenceRegression": _NUMBERS,
    "SequenceRegressionWithScaling": _NUMBERS,
    "TokenClassification": _CLASSES,
    "PairwiseTokenClassification": _CLASSES | words("adapter_dim_multiplier multilabel"),
}

# --------------------------------------------------------------------------- backbones

_RNABERT = words(
    "cache_storage_backend cache_write_buffer_size config_overwrites enable_cache file_cache_dir "
    "from_scratch frozen lora_alpha lora_dropout lora_r lora_target_modules max_length "
    "model_init_args overwrite_file_cache save_peft_only use_peft"
)
_FM4BIO = _RNABERT | words("enable_rag lora_modules_to_save lora_use_rslora")
_ONEHOT = words("max_length vocab_file")
_NOT_OF_DEBUG = words("config_overwrites from_scratch")

_OF_NUCLEOTIDES = ("aido_dna", "aido_rna")

# --------------------------------------------------------------------------- adapters

_MLP = words("activation_layer bias dropout dropout_in_middle hidden_sizes")

# in_features and the like are given by the task; a config may repeat them.
SIZES = words("in_channels in_features input_channels num_outputs out_features")
ADAPTERS: Mapping[str, Names | None] = {
    "LinearAdapter": SIZES,
    "LinearCLSAdapter": SIZES,
    "LinearMaxPoolAdapter": SIZES,
    "LinearMeanPoolAdapter": SIZES,
    "LinearTransformerAdapter": SIZES,
    "MLPAdapter": SIZES | _MLP,
    "MLPAdapterWithoutOutConcat": SIZES | _MLP,
    "MLPPoolAdapter": SIZES | _MLP | words("pooling"),
    "ResNet1DAdapter": SIZES | words("channels dropout num_blocks"),
    "ResNet2DAdapter": SIZES | words("conv_channels kernel_size num_res_blocks"),
}

# --------------------------------------------------------------------------- data

SPLITS = words(
    "config_name cv_enable_val_fold cv_fold_id_col cv_num_folds cv_replace_val_fold_as_test_fold "
    "cv_test_fold_id cv_val_offset path random_seed test_split_files test_split_name "
    "test_split_size train_split_files train_split_name valid_split_files valid_split_name "
    "valid_split_size"
)
_FILES = SPLITS | words(
    "backbone_class_path batch_size collate_fn extra_reader_kwargs num_workers "
    "persistent_workers pin_memory sampler shuffle"
)
_LABELLED = _FILES | words("generate_uid rename_cols x_col y_col")
DATA: Mapping[str, Names | None] = {
    "SequencesDataModule": _FILES | words("id_col x_col"),
    "SequenceClassificationDataModule": _LABELLED | words("class_filter"),
    "SequenceRegressionDataModule": _LABELLED | words("normalize"),
    "TokenClassificationDataModule": _LABELLED
    | words("extra_cols max_length pairwise truncate_extra_cols"),
    "RNAMeanRibosomeLoadDataModule": _LABELLED | words("normalize"),
    "ColumnRetrievalDataModule": _FILES | words("in_cols out_cols"),
}

# --------------------------------------------------------------------------- trainer

TRAINER = words(
    "accelerator accumulate_grad_batches barebones benchmark callbacks check_val_every_n_epoch "
    "default_root_dir detect_anomaly deterministic devices enable_checkpointing "
    "enable_progress_bar enable_model_summary fast_dev_run gradient_clip_algorithm "
    "gradient_clip_val inference_mode limit_predict_batches limit_test_batches "
    "limit_train_batches limit_val_batches log_every_n_steps logger max_epochs max_steps max_time "
    "min_epochs min_steps model_registry num_nodes num_sanity_val_steps overfit_batches plugins "
    "precision profiler reload_dataloaders_every_n_epochs strategy sync_batchnorm "
    "use_distributed_sampler val_check_interval"
)
WRITER = "PredictionWriter"
CALLBACKS: Mapping[str, Names | None] = {
    WRITER: words(
        "argmax_predictions delete_intermediate_files drop_special_tokens filetype output_dir "
        "remove_duplicates write_cols"
    ),
}
# What people name without a package. None of them does anything at prediction.
LIGHTNING_CALLBACKS = words(
    "BackboneFinetuning BatchSizeFinder DeviceStatsMonitor EarlyStopping FTScheduler "
    "GradientAccumulationScheduler LambdaCallback LearningRateFinder LearningRateMonitor "
    "ModelCheckpoint ModelPruning ModelSummary OnExceptionCheckpoint RichModelSummary "
    "RichProgressBar StochasticWeightAveraging TQDMProgressBar ThroughputMonitor Timer "
    "WeightAveraging"
)
LIGHTNING = ("lightning.", "pytorch_lightning.", "lightning_fabric.")

# --------------------------------------------------------------------------- look-ups


def own_name(path: str) -> str | None:
    """The name of a ModelGenerator class, with or without its package; None for another's."""
    package, _, name = path.rpartition(".")
    return name if not package or f"{package}.".startswith("modelgenerator.") else None


def known_class(kind: str, path: str, known: Mapping[str, Names | None]) -> str:
    """The name of a class that is known. Raises `MgenError` naming the nearest one."""
    name = own_name(path)
    if name is None or name not in known:
        raise MgenError(f"no {kind} {path!r}", choices(path.rpartition(".")[2], known))
    return name


def arguments_of_backbone(name: str) -> Names:
    """Names of the arguments; every known one for a family of which we do not know them."""
    if name.endswith("_onehot"):
        return _ONEHOT
    found = _RNABERT if name.startswith(_OF_NUCLEOTIDES) else _FM4BIO
    return found - _NOT_OF_DEBUG if name.endswith("_debug") else found


def lora_defaults(name: str) -> dict[str, object]:
    """LoRA's arguments where the config does not give them; {} for a family unknown to us."""
    if name.startswith(_OF_NUCLEOTIDES):
        return {"lora_r": 16, "lora_alpha": 32, "lora_target_modules": ["query", "value"]}
    if name.startswith("aido_protein"):
        every = ["query", "value", "key", "dense", "router"]
        return {"lora_r": 16, "lora_alpha": 16, "lora_target_modules": every}
    return {}


def choices(name: str, known: Collection[str]) -> str:
    """A hint: the nearest known name, and all of them."""
    return f"{near(name, set(known))} supported: {', '.join(sorted(known))}".strip()
