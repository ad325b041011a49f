# SPDX-License-Identifier: Apache-2.0
"""The public surface, frozen: a name or a signature changes here or not at all."""

import ast
import dataclasses
import importlib
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

import zfunc as zf
import zfunc.compat
from zfunc.core import collectives

NAMES = {
    "zfunc": """
        AbstractMesh CheckpointError DonatedBufferError DynamicLossScale
        LossError Mean Mesh MeshError Metrics NamedSharding P PlacementError
        Policy Program Recovery RecoveryError RematError Run Sharded
        StaticLossScale StructureError TraceError TrainState TrainStep
        Transform ZfuncError abstract accumulate all_gather all_to_all
        axis_index axis_size checkpoint core data donate eval_shape
        from_ds_config from_dtensor generate global_norm jit make_mesh models optim
        partition pmean
        ppermute precision psum psum_scatter random recovering remat reshard
        shard skip_nonfinite testing to_dtensor train_step tree_leaves tree_map
        unshard value_and_grad with_frozen
        """,
    "zfunc.checkpoint": """
        Damage DamagedError Keep Newest Pending Restored latest list_steps remove_old
        restore restore_newest save save_async
        """,
    "zfunc.compat": """
        CompatError Engine add_config_arguments init_distributed initialize
        """,
    "zfunc.config": """
        ConfigError Configured DataOptions Entry Interpretation Problem from_ds_config
        interpret
        """,
    "zfunc.models": """
        Decoder GPTConfig HFLoss ModelError ModuleLoss causal_attention decoder from_hf
        from_module gpt layer_norm lora merge_lora pack rms_norm rope_tables rotate
        split
        """,
    "zfunc.optim": """
        EmaMoments GradientTransformation KahanMoments Mask OneCycle
        ScaleByAdafactorMoments ScaleByAdagradMoments ScaleByAdamMoments
        ScaleByLearningRateMoments ScaleByLionMoments ScaleByMuonMoments
        ScaleByRmsMoments Schedule ScheduleFreeMoments StochasticRoundingMoments
        TraceMoments adafactor adagrad adam adamw add_decayed_weights
        apply_updates averaged_params chain clip_by_global_norm clip_by_value
        constant cosine decay_matrices ema hidden_matrices identity join kahan
        lamb lion lr_range_test muon one_cycle rmsprop scale_by_adafactor
        scale_by_adagrad scale_by_adam scale_by_learning_rate scale_by_lion
        scale_by_muon scale_by_rms scale_by_trust_ratio scaled schedule_free
        schedule_free_adamw schedule_free_params sgd stateless
        stochastic_rounding trace warmup_cosine warmup_cosine_lr warmup_decay_lr
        warmup_linear warmup_lr wsd
        """,
    "zfunc.testing": """
        EquivalenceError Lockstep LockstepError Recipe Simulation assert_equivalent
        differences lockstep random_batch random_tree run_lockstep simulate split_batch
        spmd tree_loss
        """,
    "zfunc.transforms": """
        Decision DynamicLossScale LossScale Policy Recovery Run StaticLossScale
        accumulate partition precision recovering remat skip_nonfinite with_frozen
        """,
}

# The names that a module defines itself.
DEFINED = {
    "zfunc.core.collectives": """
        all_gather all_to_all apply axis_index axis_size pmean ppermute psum
        psum_scatter
        """,
    "zfunc.core.random": "dropout fold_in uniform",
    "zfunc.testing.strategies": "batches meshes param_trees recipes shapes",
    "zfunc.testing.memory": "peak_live_bytes",
}

# Without annotations; the order and the defaults are the contract.
SIGNATURES = {
    "make_mesh": "(axes, *, device=None, timeout_s=None)",
    "AbstractMesh": "(axes)",
    "P": "(*entries)",
    "NamedSharding": "(mesh, spec, memory_kind='device')",
    "shard": "(params, mesh, *, tx=None, spec=None, dtype=None, key=0)",
    "unshard": "(state)",
    "reshard": "(tree, shardings)",
    "to_dtensor": "(tree)",
    "from_dtensor": "(tree, mesh)",
    "abstract": "(tree)",
    "eval_shape": "(f, *args)",
    "value_and_grad": "(f, *, has_aux=False)",
    "remat": "(block)",
    "all_gather": "(tree, axis, mesh, *, dim=0)",
    "psum": "(tree, axis, mesh)",
    "pmean": "(tree, axis, mesh)",
    "psum_scatter": "(tree, axis, mesh, *, dim=0)",
    "ppermute": "(tree, axis, mesh, perm)",
    "all_to_all": "(tree, axis, mesh, *, split_dim, concat_dim)",
    "axis_index": "(axis, mesh)",
    "axis_size": "(axis, mesh)",
    "global_norm": "(tree)",
    "checkpoint.save": "(root, state, *, cursor=None, meta=None, keep=None)",
    "checkpoint.save_async": "(root, state, *, cursor=None, meta=None, keep=None)",
    "checkpoint.restore": "(path, like, *, verify=True)",
    "checkpoint.restore_newest": "(root, like, *, verify=True)",
    "checkpoint.remove_old": "(root, keep)",
    "checkpoint.Keep": "(last=1, every=None)",
    "models.from_hf": "(source, *, task=None, mesh=None, spec=None, dtype=None, key=0, "
    "remat=None, packed=False, trainable=None, dropout=None, new=(), ignore=())",
    "models.from_module": "(module, loss, *, mesh=None, spec=None, dtype=None, "
    "trainable=None, dropout=None)",
    "models.lora": "(params, loss_fn, *, rank, alpha=None, targets, key=0)",
    "models.merge_lora": "(params, loss_fn)",
    "models.pack": "(sequences, length, *, pad_id=0, rows=None)",
    "models.split": "(params, trainable)",
    "train_step": "(loss_fn, tx, *transforms)",
    "partition": "(zero, *, axis='data', gather_dtype=None, reduce_dtype=None, "
    "persistence_threshold=0, deterministic=False, virtual_shards=None)",
    "compat.initialize": "(args=None, model=None, optimizer=None, "
    "model_parameters=None, training_data=None, lr_scheduler=None, "
    "distributed_port=29500, mpu=None, dist_init_required=None, collate_fn=None, "
    "config=None, mesh_param=None, config_params=None)",
    "compat.Engine.backward": "(self, loss, retain_graph=False, *, scale_wrt_gas=True)",
    "compat.Engine.save_checkpoint": "(self, save_dir, tag=None, client_state=None, "
    "save_latest=True)",
    "compat.Engine.load_checkpoint": "(self, load_dir, tag=None, *, "
    "load_module_only=False, load_optimizer_states=True)",
    "from_ds_config": "(source, *, world=None, auto=None, total_steps=None, "
    "optimizer=None)",
    "precision": "(policy, *, loss_scale=None)",
    "generate": "(apply, params, ids, *, max_new_tokens, attention_mask=None, "
    "temperature=0.0, top_k=None, top_p=None, eos=None, pad=None, key=0, jit=True)",
    "models.decoder": "(loss_fn)",
    "skip_nonfinite": "()",
    "with_frozen": "(loss_fn, frozen, *, axis='data')",
    "DynamicLossScale": "(initial_scale_power=16, loss_scale_window=1000, "
    "hysteresis=2, consecutive_hysteresis=False, min_loss_scale=1.0)",
    "StaticLossScale": "(scale)",
    "accumulate": "(num_microbatches)",
    "donate": "(step)",
    "tree_map": "(fn, tree, *rest, is_leaf=None)",
    "tree_leaves": "(tree, is_leaf=None)",
    "Mean": "(total, weight)",
    "Policy": "(compute, output=torch.float32)",
    "random.fold_in": "(key, data)",
    "random.uniform": "(key, shape)",
    "random.dropout": "(key, x, rate)",
    "testing.simulate": "(step, mesh_shape)",
    "testing.lockstep": "(step, mesh_shape, passes=())",
    "testing.run_lockstep": "(programs, args)",
    "testing.spmd": "(fn, mesh_shape)",
    "testing.split_batch": "(batch, mesh_shape, axis='data')",
    "optim.adam": "(learning_rate, b1=0.9, b2=0.999, eps=1e-08, weight_decay=0.0, *, "
    "kernels='auto')",
    "optim.chain": "(*transformations)",
    "optim.clip_by_global_norm": "(max_norm, *, deterministic=False)",
    "optim.apply_updates": "(params, updates)",
    "optim.cosine": "(peak, total_steps, end=0.0)",
    "optim.join": "(schedules, boundaries)",
    "optim.lr_range_test": "(lr_range_test_min_lr=0.001, lr_range_test_step_size=2000, "
    "lr_range_test_step_rate=1.0, lr_range_test_staircase=False)",
    "optim.one_cycle": "(cycle_min_lr, cycle_max_lr, decay_lr_rate=0.0, "
    "cycle_first_step_size=2000, cycle_second_step_size=None, "
    "cycle_first_stair_count=0, cycle_second_stair_count=None, decay_step_size=0, "
    "cycle_momentum=True, cycle_min_mom=0.8, cycle_max_mom=0.9, decay_mom_rate=0.0)",
    "optim.scaled": "(schedule, factor)",
    "optim.warmup_cosine_lr": "(lr, total_num_steps, warmup_min_ratio=0.0, "
    "warmup_num_steps=1000, cos_min_ratio=0.0001, warmup_type='log')",
    "optim.warmup_decay_lr": "(total_num_steps, warmup_min_lr=0.0, "
    "warmup_max_lr=0.001, warmup_num_steps=1000, warmup_type='log')",
    "optim.warmup_lr": "(warmup_min_lr=0.0, warmup_max_lr=0.001, "
    "warmup_num_steps=1000, warmup_type='log')",
    "optim.wsd": "(peak, warmup_steps, decay_steps, total_steps, end=0.0, "
    "decay_type='linear')",
    "optim.lion": "(learning_rate, b1=0.9, b2=0.999, weight_decay=0.0, mask=None, *, "
    "kernels='auto')",
    "optim.adagrad": "(learning_rate, lr_decay=0.0, weight_decay=0.0, "
    "initial_accumulator_value=0.0, eps=1e-10)",
    "optim.rmsprop": "(learning_rate, alpha=0.99, eps=1e-08, weight_decay=0.0, "
    "momentum=0.0, centered=False)",
    "optim.schedule_free_adamw": "(learning_rate, b1=0.9, b2=0.999, eps=1e-08, "
    "weight_decay=0.0, warmup_steps=0, mask=None)",
    "optim.ema": "(decay=0.999)",
    "optim.lamb": "(learning_rate, b1=0.9, b2=0.999, eps=1e-08, weight_decay=0.0, "
    "mask=None, *, bias_correction=True, max_coeff=10.0, min_coeff=0.01, "
    "kernels='auto')",
    "optim.scale_by_trust_ratio": "(max_coeff=10.0, min_coeff=0.01)",
    "optim.muon": "(learning_rate=0.02, momentum=0.95, weight_decay=0.0, *, "
    "nesterov=True, num_steps=5, scale='original', dtype=None, "
    "adam_learning_rate=0.0003, b1=0.9, b2=0.95, eps=1e-10, mask=None, "
    "decay_mask=None)",
    "optim.hidden_matrices": "(path, leaf)",
    "optim.adafactor": "(learning_rate=0.01, momentum=0.0, weight_decay=0.0, *, "
    "b2_decay=-0.8, eps1=1e-30, eps2=0.001, clip=1.0, mask=None)",
    "optim.averaged_params": "(state)",
    "optim.schedule_free_params": "(state)",
    "optim.kahan": "(tx)",
    "optim.stochastic_rounding": "(tx, key=0)",
}

FIELDS = {
    "TrainState": "step params grads moments loss_scale key metrics",
    "TrainStep": "loss tx grad accumulate scaling",
    "Metrics": "loss grad_norm skipped aux",
    "Mean": "total weight",
    "models.Decoder": "init_cache apply max_positions vocab_size encode start programs",
    "inference.Generated": "ids lengths finished",
    "config.Configured": "tx transforms jit data",
    "config.Interpretation": "tx transforms jit data schedule shard stage precision "
    "clipping entries defaults notes",
    "config.Entry": "path value status became note",
    "config.Problem": "path got expected instead",
    "config.DataOptions": "train_batch_size micro_batch_size accumulation_steps world "
    "drop_last seed",
    "models.HFLoss": "module buffers config kind frozen packed names remat run",
    "models.ModuleLoss": "module buffers frozen loss names",
    "checkpoint.Restored": "state cursor meta",
    "checkpoint.Newest": "path restored damaged",
    "checkpoint.Damage": "path why",
    "Sharded": "buffer sharding global_shape",
    "NamedSharding": "mesh spec memory_kind",
    "optim.GradientTransformation": "init update leafwise halves deterministic "
    "fused factor",
}


def get(path):
    found = zf
    for part in path.split("."):
        found = getattr(found, part)
    return found


def exported(module):
    """What a package re-exports, with the convention `from .x import y as y`."""
    tree = ast.parse(Path(module.__file__).read_text("utf-8"))
    imports = [n for n in tree.body if isinstance(n, ast.ImportFrom)]
    return {alias.asname for node in imports for alias in node.names} - {None}


def defined(module):
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", "") == module.__name__
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_names_of_a_package(name):
    module = importlib.import_module(name)
    assert exported(module) == set(NAMES[name].split())
    for each in NAMES[name].split():
        assert hasattr(module, each)


@pytest.mark.parametrize("name", DEFINED)
def test_the_names_of_a_module(name):
    assert defined(importlib.import_module(name)) == set(DEFINED[name].split())


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    thing = get(name)
    made = thing.__new__ if name == "P" else thing
    signature = inspect.signature(made)
    parameters = [
        p.replace(annotation=inspect.Parameter.empty)
        for p in signature.parameters.values()
        if p.name != "cls"
    ]
    bare = signature.replace(
        parameters=parameters, return_annotation=inspect.Signature.empty
    )
    assert str(bare) == SIGNATURES[name]


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name):
    thing = get(name)
    fields = getattr(thing, "_fields", None)
    if fields is None:
        fields = [field.name for field in dataclasses.fields(thing)]
    assert list(fields) == FIELDS[name].split()


def test_every_contract_signature_is_documented():
    """Each argument of a function is spoken of in its docstring."""
    for name in ("make_mesh", "shard", "partition", "train_step", "accumulate"):
        doc = get(name).__doc__
        for argument in inspect.signature(get(name)).parameters:
            assert f"{argument}:" in doc, f"{name}: {argument}"


def public_things():
    for package, names in {**NAMES, **DEFINED}.items():
        module = importlib.import_module(package)
        for name in names.split():
            thing = getattr(module, name)
            alias = isinstance(thing, types.ModuleType) or not (
                inspect.isclass(thing) or inspect.isfunction(thing)
            )
            if not alias:
                yield f"{package}.{name}", thing


@pytest.mark.parametrize(("path", "thing"), list(public_things()))
def test_every_name_has_a_docstring_with_an_example(path, thing):
    doc = inspect.getdoc(thing)
    assert doc, f"{path} has no docstring"
    first = doc.splitlines()[0]
    assert first.endswith((".", ":")), f"{path}: {first}"
    if path != "zfunc.core.collectives.apply":
        assert ">>>" in doc, f"{path} has no example"


@pytest.mark.parametrize(("path", "thing"), list(public_things()))
def test_every_argument_is_annotated(path, thing):
    if not inspect.isfunction(thing):
        return
    signature = inspect.signature(thing)
    for p in signature.parameters.values():
        assert p.annotation is not p.empty, f"{path}: {p.name}"
    assert signature.return_annotation is not signature.empty, path


def test_a_name_says_where_it_lives():
    """What a user sees in a traceback or a pickle can be imported."""
    for path, thing in public_things():
        home = importlib.import_module(thing.__module__)
        assert getattr(home, thing.__name__) is thing, path


def test_collectives_are_the_same_at_the_top():
    for name in DEFINED["zfunc.core.collectives"].split():
        if name != "apply":
            assert getattr(zf, name) is getattr(collectives, name)


def test_importing_zfunc_starts_and_needs_nothing():
    """No process group, no generator, no thread count; no hypothesis, no matplotlib."""
    program = (
        "import sys, torch\n"
        "before = torch.get_rng_state(), torch.get_num_threads()\n"
        "import zfunc\n"
        "assert torch.equal(before[0], torch.get_rng_state())\n"
        "assert before[1] == torch.get_num_threads()\n"
        "assert not torch.distributed.is_initialized()\n"
        "assert not torch.cuda.is_initialized()\n"
        "heavy = {'hypothesis', 'matplotlib', 'transformers', 'rich', 'typer'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_an_attribute_that_is_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        zf.testing.nothing  # noqa: B018
    assert zf.testing.strategies.meshes
