"""The whole of Generalist in one process: the reference that the Ray runtime equals bit for bit on CPU."""

from genray.core.allocator import keep_freed_memory
from genray.core.determinism import deterministic
from genray.core.threads import threads_kept
from genray.evaluation import Evaluator, chunks, join_flags
from genray.learners.base_learner import BaseLearner
from genray.learners.global_learner import GlobalLearner
from genray.run.devices import alone_lines, device_names, evaluation_threads, learner_threads, local_device
from genray.runtime.recovery import run_with_recovery
from genray.types import WeightSnapshot


def run_local(recorder, progress) -> dict:
    """Trains all base learners window by window, one after another, and evaluates the result.

    Args:
        recorder: a `RunRecorder`, with the setup and the state to go on from; gets every window.
        progress: a `Progress`.

    Returns:
        The final record (`results.json`).
    """
    keep_freed_memory()
    for line in alone_lines(recorder.setup.config):
        progress.say(line)
    recorder.begin(device_names(recorder.setup.config))
    with threads_kept(), deterministic(recorder.setup.config.compute.deterministic):
        return run_with_recovery(lambda setup, state: _run(setup, recorder, progress, state), recorder, progress)


def _run(setup, recorder, progress, state):
    plan, device = setup.plan, local_device(setup.config)
    learners = {name: _learner(name, setup, device) for name in setup.config.base_learners}
    glob = GlobalLearner(setup.config)
    threads = evaluation_threads(setup.config, setup.architecture)
    evaluator = Evaluator(setup.config, setup.build_network(), setup.splits, device, threads)
    first, theta_g = 0, None
    if state:
        first, theta_g = state["next_window"], WeightSnapshot(**state["theta_g"])
        for name, learner in learners.items():
            learner.load_state_dict(state["learners"][name])
    for learner in learners.values():
        learner.on_step = lambda: progress.steps(sum(lr.step for lr in learners.values()) / len(learners))

    split = setup.config.evaluation.select_on
    for window in plan.windows[first:]:
        stats = {name: learner.run_window(window.start, window.stop) for name, learner in learners.items()}
        scores, shipped, own = None, None, {}
        if window.evaluate and setup.config.evaluation.base_learners:  # before theta_g takes the place of raw weights
            own = {name: evaluator.evaluate(lr.model_snapshot(), split) for name, lr in learners.items()}
        if window.hands_over:
            theta_g = glob.combine([learner.contribution() for learner in learners.values()])
        if window.redistribute:
            for learner in learners.values():
                learner.load_global(theta_g)
        if window.evaluate:
            shipped = evaluator.finalize(theta_g)
            scores = evaluator.evaluate(shipped, split)
        recorder.window_done(window, stats, scores, lambda shipped=shipped: shipped, own)
        if window.checkpoint:
            recorder.write_state(window, {name: lr.state_dict() for name, lr in learners.items()}, theta_g)

    own_models = {name: learner.model_snapshot() for name, learner in learners.items()}
    judged = recorder.models_to_judge(evaluator.finalize(theta_g), own_models)
    return recorder.finish(_judge(evaluator, judged, progress))


def _learner(name, setup, device):
    threads = learner_threads(setup.config, setup.architecture, name)
    return BaseLearner(name, setup.plan, setup.build_network(), setup.splits["train"], device, threads)


def _judge(evaluator, judged, progress):
    """Flags of all models on the test images."""
    size = len(evaluator.splits["test"])
    ranges = chunks(size, evaluator.config.evaluation.batch_size)
    progress.phase(f"evaluating {len(judged)} models on {size} test images,", len(judged) * len(ranges), unit="chunks")
    flags = {}
    for name, snapshot in judged.items():
        parts = []
        for chunk in ranges:
            parts.append(evaluator.evaluate_chunk(snapshot, "test", *chunk))
            progress.steps(progress.done + 1)
        flags[name] = join_flags(parts)
    return flags
