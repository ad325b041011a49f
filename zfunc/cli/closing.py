# SPDX-License-Identifier: Apache-2.0
"""What follows the last step: evaluation, comparison, sample, files, table."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from zfunc.cli.corpus import Corpus
from zfunc.cli.evaluate import sample_text, sha256_of, validation_loss
from zfunc.cli.loop import Progress, Training
from zfunc.cli.metrics import Row, read_rows
from zfunc.cli.plot import plot_loss
from zfunc.cli.program import full_params
from zfunc.cli.report import (
    Summary,
    closing_table,
    final_train_loss,
    mean_tokens_per_s,
    measured_bytes,
)
from zfunc.cli.rundir import RunDir, write_atomically
from zfunc.cli.verify import Differences, compare
from zfunc.data import unigram_entropy
from zfunc.models import gpt


def finish(
    training: Training,
    corpus: Corpus,
    end: Progress,
    run: RunDir,
    console: Console | None,
) -> None:
    """Evaluate a trained model; rank 0, which has the console, writes and shows it.

    Args:
      training: The run.
      corpus: Its text.
      end: After the last step.
      run: Its directory.
      console: Of rank 0; None on the others.
    """
    config, mesh = training.config, training.mesh
    params = full_params(end.state)
    rank = int(mesh.rank)
    validation = validation_loss(params, config, corpus.validation, mesh, rank)
    differences = compare(config, mesh, training.loader)
    if console is None:
        return
    rows = read_rows(run.metrics)
    entropy = unigram_entropy(corpus.whole)
    summary = _summary(
        training, end, rows, differences, (validation, entropy), sha256_of(params)
    )
    text = sample_text(params, config, mesh)
    write_atomically(run.sample, text)
    write_atomically(run.summary, summary.model_dump_json(indent=2) + "\n")
    plot_loss(run.plot, rows, entropy)
    if config.sample_tokens:
        console.print(Panel(Text(text), title="text from the model", width=88))
    console.print(closing_table(summary))
    num_skipped = sum(row.skipped for row in rows)
    if num_skipped:
        console.print(f"{num_skipped} steps overflowed and changed nothing")
    if config.verify_steps and not differences.steps:
        console.print("the first steps overflowed: not compared with an unsharded run")
    names = ", ".join(path.name for path in run.files())
    console.print(f"written to {run.root}: {names}", markup=False, soft_wrap=True)


def _summary(
    training: Training,
    end: Progress,
    rows: list[Row],
    differences: Differences,
    losses: tuple[float, float],
    params_sha256: str,
) -> Summary:
    config, state = training.config, end.state
    validation, entropy = losses
    return Summary(
        ranks=training.mesh.size,
        zero=config.zero,
        precision=config.precision,
        steps=end.step,
        num_params=gpt.num_params(config.model),
        params=measured_bytes(state.params),
        grads=measured_bytes(state.grads),
        moments=measured_bytes(state.moments),
        peak_rss_mb=rows[-1].peak_rss_mb if rows else 0.0,
        train_loss=final_train_loss(rows),
        validation_loss=validation,
        unigram_entropy=entropy,
        tokens=config.batch_size * config.seq_len * end.step,
        tokens_per_s=mean_tokens_per_s(rows),
        compared_steps=differences.steps,
        loss_difference=differences.loss,
        gradient_difference=differences.gradients,
        params_sha256=params_sha256,
    )
