"""Two tasks for lm-evaluation-harness that need no network, made of the embedded model's held-out test text.

A patched model is a model: hand it to the harness like any other, for these tasks or for those that it has itself.

    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)
    manager = TaskManager(include_path=FOLDER)
    with BHRoutingIntegration(model, alpha=0.01) as bh:
        found = simple_evaluate(lm, tasks=["bh_cloze", "bh_continuation"], task_manager=manager)
    found["results"]["bh_cloze"]["acc,none"], found["results"]["bh_cloze"]["acc_stderr,none"]

The harness is optional: ``pip install 'bhlib[tasks]'``. ``README.md`` here tells what the items are and where they come
from.
"""

from pathlib import Path

#: The folder of the task files, for ``TaskManager(include_path=FOLDER)`` and ``lm_eval --include_path``.
FOLDER = str(Path(__file__).parent)
