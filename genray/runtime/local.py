"""Generalist in one process: the reference; the Ray runtime gives the same bits on CPU."""

from genray.core.allocator import keep_freed_memory
from genray.core.determinism import deterministic
from genray.core.threads import threads_kept
from genray.evaluation import Evaluator, chunks, join_flags
from genray.learners.base_learner import BaseLearner
from genray.learners.global_learner import GlobalLearner
from genray.run.device_memory import check_device_memory, naming_memory
from genray.run.devices import alone_lines, device_names, evaluation_threads, learner_threads, local_device
from genray.runtime.protocols import Progress, Recorder
from genray.types import WeightSnapshot


def run_local(recorder: Recorder, progress: Progress) -> dict:
    """Trains all base learners window by window, one after another, and evaluates the result.

    Args:
        recorder: holds the setup and the start state; records every window.
        progress: the display.

    Returns:
        The final record (`results.json`).
    """
    keep_freed_memory()
    config = recorder.setup.config
    check_device_memory(recorder.setup, dict.fromkeys(config.base_learners, 1), local_device(config))
    for line in alone_lines(config):
        progress.say(line)
    recorder.begin(device_names(config))
    with threads_kept(), deterministic(config.compute.deterministic):
        return _train(recorder, progress)


def _train(recorder, progress):
    setup, plan, config = recorder.setup, recorder.setup.plan, recorder.setup.config
    device, split, first, theta_g = local_device(config), config.evaluation.select_on, 0, None
    learners = {}
    for name in config.base_learners:
        threads = learner_threads(config, setup.architecture, name)
        target = setup.target_network(name)
        with naming_memory(setup, name):
            learners[name] = BaseLearner(
                name, plan, setup.build_network(), setup.splits["train"], device, threads, target=target
            )
        learners[name].on_step = lambda: progress.steps(sum(lr.step for lr in learners.values()) / len(learners))
    glob = GlobalLearner(config)
    threads = evaluation_threads(config, setup.architecture)
    evaluator = Evaluator(config, setup.build_network(), setup.splits, device, threads)
    state = recorder.go_back()
    if state:
        first, theta_g = state["next_window"], WeightSnapshot(**state["theta_g"])
        for name, learner in learners.items():
            learner.load_state_dict(state["learners"][name])

    for window in plan.windows[first:]:
        stats = {}
        for name, learner in learners.items():
            with naming_memory(setup, name):
                stats[name] = learner.run_window(window.start, window.stop)
        scores, shipped, own = None, None, {}
        if window.evaluate and config.evaluation.base_learners:  # before theta_g replaces the raw weights
            own = {name: evaluator.evaluate(learner.model_snapshot(), split) for name, learner in learners.items()}
        if window.hands_over:
            theta_g = glob.combine([learner.contribution() for learner in learners.values()])
        handed = plan.hand_overs(window.stop)
        averages = {of: learners[of].model_snapshot() for _, of, _ in handed}
        if window.redistribute:
            for learner in learners.values():
                learner.load_global(theta_g)
        for name, of, method in handed:
            getattr(learners[name], method)(averages[of])
        if window.evaluate:
            shipped = evaluator.finalize(theta_g)
            scores = evaluator.evaluate(shipped, split)
        recorder.window_done(window, stats, scores, lambda shipped=shipped: shipped, own)
        if window.checkpoint:
            recorder.write_state(window, {name: lr.state_dict() for name, lr in learners.items()}, theta_g)

    own_models = {name: learner.model_snapshot() for name, learner in learners.items()}
    judged = recorder.models_to_judge(evaluator.finalize(theta_g), own_models)
    return recorder.finish(_judge(evaluator, judged, progress))


def _judge(evaluator, judged, progress):
    """Per-example flags of all models on the test images."""
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
