"""One run of a method: three cycles from the same student on the same demonstrations, and its success at the end.

The first cycle is `sft` for every method, so it is trained once for all methods of a scene, and so are the own
episodes that the policy plays after it. No gate: a worse adapter goes on too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any, TypeVar

import torch

from benchmarks.experience import experience
from benchmarks.harder_worlds import ErringExpert, PermutingExpert, Resumed
from benchmarks.lockstep import MAX_ACTION_TOKENS, load_policy
from benchmarks.own_choice import majority, raft, sft_rft_majority
from benchmarks.recipes import CONTROL, DEFAULT, Labels, Method, Samples, Takes
from benchmarks.rollouts import MAX_ROWS, Rollouts
from benchmarks.students import first_unseen
from learner.data.comparison import compare
from learner.data.training_data import PolicyAction, State, TrainingData, Trajectory
from learner.objectives.build import NothingToLearn, objective_of
from learner.objectives.objectives import Objective
from learner.options import TrainingOptions
from learner.training.discriminator import Discriminator, DiscriminatorOptions, discriminate
from learner.training.trainer import Trainer
from policies.chat.chat_protocol import ChatProtocol, action_message
from policies.types import Action, Completion, FinishReason, MalformedAction, TokenIds, ToolCall, ToolCalls
from tools.worlds import load_world
from tools.worlds.world import Message, Task, TaskId

NUM_CYCLES = 3
NUM_SAMPLES = 8
"""Of the policy at an own state, where a method looks at them."""
NUM_FOLD_SAMPLES = 4
NUM_BRANCHES = 24
"""Failed episodes of a cycle that are branched, each at one state, in as many ways as there are samples."""
DISCRIMINATOR_LR = 2e-3

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Axis:
    """What is made harder."""

    name: str | None = None
    """None: the plain setting."""
    noise: float = 0.0
    """Share of states at which the expert makes a worse step."""
    permutes: bool = False
    rank: int = 16
    judged_share: float = 1.0
    """Of own episodes whose outcome somebody tells."""
    traffic: int = 1
    """So many times as many own episodes a cycle."""
    is_narrow: bool = False
    """Taught, and practised, is only what the expert does in few steps; tried is the rest: what is forgotten there."""
    max_repeats: int | None = None
    """Own episodes and trials end where the same action has been told the same so many times."""
    rates: tuple[tuple[str, float], ...] = ()
    """Methods and their peak learning rates, where they were chosen on the world's own validation tasks."""


AXES = {
    axis.name: axis
    for axis in (
        Axis(),
        Axis("expert errs 0.1", noise=0.1),
        Axis("expert errs 0.25", noise=0.25),
        Axis("several right actions", permutes=True),
        Axis("LoRA rank 1", rank=1),
        Axis("5 % judged", judged_share=0.05),
        Axis("25 % judged", judged_share=0.25),
        Axis("4 x the traffic", traffic=4),
        Axis("short tasks taught, long ones tried", is_narrow=True),
        # Nothing is harder: of a real model that goes round in circles the trials take most of the time.
        Axis("circles cut", max_repeats=3),
        # Of 4e-3, 2e-3, 1e-3 and 5e-4 the best of each on validation tasks, seeds 11 to 13.
        Axis("rates tuned on babyai", rates=((CONTROL, 2e-3), (DEFAULT, 5e-4))),
    )
}


@dataclass(frozen=True, slots=True)
class Scene:
    """Where methods are tried."""

    world: str
    student: str
    """Its name in the table."""
    base: Path
    seed: int
    demonstrations: int
    axis: Axis = AXES[None]
    split: str = "heldout"
    num_tasks: int = 200
    gradient_steps: int = 24
    """Of a cycle, for every method."""
    num_own_episodes: int = 48
    """Of a cycle: one at each demonstrated task, the others at tasks never seen before."""
    device: str = "cpu"
    """Where it is sampled and trained."""

    @property
    def is_small(self) -> bool:
        """Whether the student is one of ours, and not a real model."""
        return self.student in ("novice", "student")


@dataclass(frozen=True, slots=True)
class Result:
    """The agent after the last cycle."""

    success_t1: float
    """Mean outcome in % on the scene's tasks, at temperature 1."""
    success_greedy: float
    cpu_seconds: float
    """Of one thread, all cycles: sampling, own episodes and training; measuring is left out."""
    episodes_seconds: float
    """Of it, playing own episodes: what a server's users do, so that its learner does not."""
    notes: tuple[str, ...]
    """Why cycles taught nothing."""
    diagnostics: dict[str, float]
    """Of the last cycle."""


class BriefRollouts(Rollouts):
    """Rollouts that end an action at four times the longest of the expert's: it is wrong before, and one row that
    writes on and on holds up all the others."""

    def learn_length(self, demonstrations: Sequence[Trajectory]) -> None:
        longest = max(len(state.expert or ()) for each in demonstrations for state in each.states)
        self.max_action_tokens = min(MAX_ACTION_TOKENS, 4 * longest)

    def samples_at(
        self, network: Any, prompts: Sequence[TokenIds], num: int, generator: torch.Generator
    ) -> list[list[Completion]]:
        """`num` actions after each prompt, at temperature 1."""
        # Alike in length, to need little padding.
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        found: list[list[Completion]] = [[] for _ in prompts]
        size = max(1, MAX_ROWS // num)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            lockstep = self._lockstep(network, len(part), generator)
            lockstep.read([prompts[place] for place in part])
            lockstep.keep([row for row in range(len(part)) for _ in range(num)])  # each prompt is read once
            completions = lockstep.complete(torch.ones(len(part) * num))
            for number, place in enumerate(part):
                found[place] = completions[number * num : (number + 1) * num]
        return found


@dataclass(slots=True)
class Stage:
    """A scene with what all its methods share."""

    scene: Scene
    folder: Path
    """For adapters."""
    rollouts: BriefRollouts = field(init=False)
    demonstrated: list[Task] = field(init=False)
    others: list[Task] = field(init=False)
    tried: list[Task] = field(init=False)
    """At which success is measured."""
    demonstrations: tuple[Trajectory, ...] = field(init=False)
    _shared: dict[str, tuple[Any, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        scene = self.scene
        world = load_world(scene.world)
        if scene.axis.noise:
            world = ErringExpert(world, scene.axis.noise, scene.seed)
        if scene.axis.permutes:
            world = PermutingExpert(world, scene.seed)
        self.rollouts = BriefRollouts(world, scene.base)
        self.rollouts.max_repeats = scene.axis.max_repeats
        unseen = range(first_unseen(scene.world) if scene.student == "student" else 0, world.splits["train"])
        order = Random(f"demonstrations/{scene.seed}").sample(unseen, min(len(unseen), 1000))
        tasks = [world.task("train", index) for index in order]
        tried = [world.task(scene.split, index) for index in range(world.splits[scene.split])]
        if scene.axis.is_narrow:
            tasks, tried = tasks[:400], tried[: 3 * scene.num_tasks]
            lengths = {task.id: self._num_steps(task) for task in (*tasks, *tried)}
            middle = median(lengths[task.id] for task in tasks)
            tasks = [task for task in tasks if lengths[task.id] <= middle]
            tried = [task for task in tried if lengths[task.id] > middle]
        self.tried = tried[: scene.num_tasks]
        found = list[Trajectory]()
        place = 0
        while len(found) < scene.demonstrations:
            found += [each for each in self.rollouts.demonstrations([tasks[place]]) if self._is_success(each)]
            place += 1
        self.demonstrations = tuple(found)
        self.rollouts.learn_length(found)
        self.demonstrated = [task for task in tasks[:place] if task.id in {each.task for each in found}]
        self.others = tasks[place:]

    def _num_steps(self, task: Task) -> int:
        """Of the expert; endless where it does not succeed."""
        found = self.rollouts.demonstrations([task])
        return len(found[0].states) if found else 1000

    def shared(self, name: str, make: Callable[[], Value]) -> tuple[Value, float]:
        """What all methods of the scene have alike, made once, and the CPU seconds that it took."""
        if name not in self._shared:
            began = time.process_time()
            value = make()
            self._shared[name] = value, time.process_time() - began
        return self._shared[name]

    def _is_success(self, demonstration: Trajectory) -> bool:
        """An expert who errs may fail; nobody would show that."""
        assert demonstration.task is not None
        world, protocol = self.rollouts.world, self.rollouts.protocol
        place = TaskId.parse(demonstration.task)
        episode = world.open(world.task(place.split, place.index))
        for state in demonstration.states:
            episode.play(action_message(protocol.parse(state.expert or ())))
        return episode.outcome() == 1.0


class Run:
    """One method on a stage."""

    def __init__(self, stage: Stage, name: str, method: Method) -> None:
        self._stage, self._scene = stage, stage.scene
        self._method = replace(method, lr=dict(stage.scene.axis.rates).get(name, method.lr))
        self._folder = stage.folder / name.replace("/", "_")
        self._adapter: Path | None = None
        self._own: list[list[Trajectory]] = []
        """Own episodes, cycle by cycle."""
        self._seconds = 0.0
        self._episodes_seconds = 0.0
        self._notes = list[str]()
        self._diagnostics = dict[str, float]()

    def result(self) -> Result:
        """Run all cycles, and measure."""
        if self._method.objective == "none":
            sampled, greedy = measured(self._stage, self._network())
            return Result(sampled, greedy, 0.0, 0.0, (), {})
        first = 0
        if not self._method.at_once:
            self._adapter = self._take(f"first cycle at {self._method.lr}", lambda: self._first_cycle())
            first = 1
        for number in range(first, NUM_CYCLES):
            self._cycle(number)
        sampled, greedy = measured(self._stage, self._network())
        return Result(sampled, greedy, self._seconds, self._episodes_seconds, tuple(self._notes), self._diagnostics)

    # ------------------------------------------------------------------------------------------- cycles

    def _first_cycle(self) -> Path:
        data = TrainingData(self._stage.demonstrations)
        sft = objective_of("sft", data, replace(self._method.objectives, own_states=False))
        folder = self._stage.folder / f"first-{self._method.lr}"
        return self._trained(sft, folder, 0, self._scene.gradient_steps, None)[0]

    def _cycle(self, number: int) -> None:
        training_data = self._training_data(number)
        began = time.process_time()
        try:
            for part, (objective, steps) in enumerate(self._objectives(training_data, number)):
                folder = self._folder / f"{number}-{part}"
                self._adapter, self._diagnostics = self._trained(objective, folder, number, steps, self._adapter)
        except NothingToLearn as reason:
            self._notes.append(str(reason))
            sft = objective_of("sft", TrainingData(self._stage.demonstrations), self._method.objectives)
            self._adapter, self._diagnostics = self._trained(
                sft, self._folder / str(number), number, self._scene.gradient_steps, self._adapter
            )
        self._seconds += time.process_time() - began

    def _objectives(self, training_data: TrainingData, number: int) -> list[tuple[Objective, int]]:
        """What is trained one after the other, and the gradient steps of each."""
        method, options = self._method, self._method.objective_options
        if method.objective == "experience, sft":
            sft = objective_of("sft", training_data, options)
            return [
                (experience(training_data), self._scene.gradient_steps // 2),
                (sft, self._scene.gradient_steps // 2),
            ]
        discriminator = self._discriminator(training_data, number) if method.objective in ("inverse", "raft") else None
        match method.objective:
            case "majority":
                objective: Objective = majority(training_data, options)
            case "raft":
                assert discriminator is not None
                objective = raft(training_data, options, discriminator)
            case "sft_rft, majority":
                objective = sft_rft_majority(training_data, options)
            case name:
                objective = objective_of(name, training_data, options, discriminator)
        return [(objective, self._scene.gradient_steps)]

    def _trained(
        self, objective: Objective, folder: Path, number: int, steps: int, begin: Path | None
    ) -> tuple[Path, dict[str, float]]:
        trainer = Trainer(self._scene.base, begin, self._options(number, steps), self._scene.device)
        report = trainer.train(objective)
        assert report.num_gradient_steps == steps
        trainer.network.save_pretrained(folder)
        return folder, report.diagnostics

    def _options(self, number: int, steps: int) -> TrainingOptions:
        return TrainingOptions(
            lr=self._method.lr if self._scene.is_small else None,  # by its width
            epochs=0,  # as many gradient steps as follow, however many trajectories there are
            min_gradient_steps=steps,
            trajectories_per_step=self._method.trajectories_per_step,
            rank=self._scene.axis.rank,
            seed=1000 * self._scene.seed + number,
        )

    def _discriminator(self, training_data: TrainingData, number: int) -> Discriminator:
        training = replace(self._options(number, self._scene.gradient_steps), lr=DISCRIMINATOR_LR)
        options = DiscriminatorOptions(training=training, held_out_share=0.0)
        return discriminate(
            TrainingData(with_hard_negatives(training_data.demonstrations, self._stage.rollouts.protocol)),
            self._scene.base,
            self._method.objectives,
            options,
        )

    # ------------------------------------------------------------------------------------------- training data

    def _training_data(self, number: int) -> TrainingData:
        method = self._method
        demonstrations = self._stage.demonstrations
        if method.samples in (Samples.FOLDS, Samples.BOTH):
            demonstrations = self._take("folds", self._inspected_by_folds)
        if method.takes:
            self._own.append(self._own_episodes(number))
        return TrainingData(demonstrations, self._own_with_ages())

    def _take(self, name: str, make: Callable[[], Value]) -> Value:
        value, seconds = self._stage.shared(name, make)
        self._seconds += seconds
        return value

    def _own_episodes(self, number: int) -> list[Trajectory]:
        """Of this cycle's policy, with what the method may know of them."""
        is_first = number == int(not self._method.at_once)
        name = f"own episodes at {self._method.lr}" if is_first else f"{self._folder.name}/{number}"
        way = f"{self._method.at_once} {self._asks_expert} {self._max_own_steps}"
        before = self._seconds
        played = self._take(f"{name} {way}", lambda: self._played(number))
        self._episodes_seconds += self._seconds - before
        began = time.process_time()
        known = self._known(played, number)
        self._seconds += time.process_time() - began
        return known

    def _played(self, number: int) -> list[Trajectory]:
        stage = self._stage
        num_episodes = stage.scene.num_own_episodes * stage.scene.axis.traffic
        num_others = num_episodes - len(stage.demonstrated)
        tasks = stage.demonstrated + stage.others[number * num_others : (number + 1) * num_others]
        num_answered = len(stage.demonstrated)
        answered = range(num_answered, 2 * num_answered) if self._asks_expert else ()
        draw = self._generator(number, 1)
        longest = self._max_own_steps
        return stage.rollouts.own_trajectories(self._network(), tasks, draw, f"own/{number}", answered, longest)

    @property
    def _max_own_steps(self) -> int | None:
        """Where nothing but successes is learned, an episode ends one step after it has become too long for that."""
        if self._method.objective != "sft_rft" or self._method.takes != (Takes.OUTCOMES,):
            return None
        longest = max(len(each.states) for each in self._stage.demonstrations)
        return int(self._method.objectives.max_success_length * longest) + 1

    @property
    def _asks_expert(self) -> bool:
        return Takes.ANSWERS in self._method.takes

    def _known(self, played: Sequence[Trajectory], number: int) -> list[Trajectory]:
        draw = Random(f"judged/{self._scene.seed}/{number}")
        share = self._scene.axis.judged_share if Takes.OUTCOMES in self._method.takes else 0.0
        is_judged = {each.episode_id: draw.random() < share for each in played}
        labelled = self._labelled(played, is_judged, number)
        return [
            replace(
                labelled.get(each.episode_id) or _without_expert(each),
                outcome=each.outcome if is_judged[each.episode_id] else None,
            )
            for each in played
        ]

    def _labelled(self, played: Sequence[Trajectory], is_judged: dict[str, bool], number: int) -> dict[str, Trajectory]:
        """Own episodes with answers, by their ids; or with samples, where nobody answers or judges."""
        method, num_answered = self._method, len(self._stage.demonstrated)
        fresh = played[num_answered:]
        if method.labels is Labels.CRITICAL:
            return self._branched([each for each in played if each.outcome != 1.0][:NUM_BRANCHES], number)
        if method.samples_silent_states:
            silent = [_without_expert(each) for each in fresh if not is_judged[each.episode_id]][: method.num_sampled]
            if not silent:
                return {}
            return {each.episode_id: each for each in self._sampled(silent, number)}
        if Takes.ANSWERS not in method.takes:
            return {}
        answered = fresh[:num_answered]
        if method.samples is Samples.OWN_STATES:
            answered = self._sampled(answered, number)
        if method.labels is Labels.CONFIRMED:
            answered = [_confirmed(each) for each in answered]
        if method.labels is not Labels.TO_SLIP:
            answered = [_answered_everywhere(each) for each in answered]
        return {each.episode_id: each for each in answered}

    def _own_with_ages(self) -> tuple[Trajectory, ...]:
        newest = len(self._own) - 1
        return tuple(_aged(each, newest - cycle) for cycle, own in enumerate(self._own) for each in own)

    # ------------------------------------------------------------------------------------------- samples

    def _network(self) -> Any:
        return load_policy(self._scene.base, self._adapter, self._scene.device)

    def _generator(self, cycle: int, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_000 * self._scene.seed + 1000 * cycle + purpose)

    def _sampled(self, trajectories: Sequence[Trajectory], number: int) -> list[Trajectory]:
        """With samples of the policy at every state, beside what it did there."""
        protocol = self._stage.rollouts.protocol
        states = [state for each in trajectories for state in each.states]
        prompts, generator = [state.prompt for state in states], self._generator(number, 3)
        drawn = self._stage.rollouts.samples_at(self._network(), prompts, NUM_SAMPLES - 1, generator)
        found = {
            state.id: replace(
                state, policy_actions=state.policy_actions + _as_policy_actions(state, completions, protocol)
            )
            for state, completions in zip(states, drawn, strict=True)
        }
        return [replace(each, states=tuple(found[state.id] for state in each.states)) for each in trajectories]

    def _inspected_by_folds(self) -> tuple[Trajectory, ...]:
        """The demonstrations, each with samples of a policy that has not seen it: after SFT the policy repeats those
        that it has seen, and a comparison there finds nothing."""
        demonstrations = self._stage.demonstrations
        found = dict[str, Trajectory]()
        for fold in (0, 1):
            seen = TrainingData(demonstrations[1 - fold :: 2])
            sft = objective_of("sft", seen, replace(self._method.objectives, own_states=False))
            folder = self._stage.folder / f"fold-{fold}"
            adapter, _ = self._trained(sft, folder, 900 + fold, self._scene.gradient_steps, None)
            tasks = self._stage.demonstrated[fold::2]
            inspected = self._stage.rollouts.inspected(
                load_policy(self._scene.base, adapter, self._scene.device),
                tasks,
                NUM_FOLD_SAMPLES,
                self._generator(fold, 4),
            )
            found |= {each.episode_id: each for each in inspected}
        return tuple(found.get(each.episode_id, each) for each in demonstrations)

    # ------------------------------------------------------------------------------------------- branches

    def _branched(self, failed: Sequence[Trajectory], number: int) -> dict[str, Trajectory]:
        """Failed episodes branched by replay: a state where another sample of the policy led to success has it as its
        answer (verified critical steps, arXiv 2602.03412)."""
        draw = Random(f"branches/{self._scene.seed}/{number}")
        silent = [_without_expert(each) for each in failed]
        places = [draw.randrange(len(each.states)) for each in silent]
        chosen = [replace(each, states=(each.states[at],)) for each, at in zip(silent, places, strict=True)]
        sampled = self._sampled(chosen, number)
        branches = [
            (which, action.token_ids)
            for which, each in enumerate(sampled)
            for action in _different(each.states[0].policy_actions)
        ]
        outcomes = self._continued([(silent[which], places[which], action) for which, action in branches], number)
        found = dict[str, Trajectory]()
        for (which, action), outcome in zip(branches, outcomes, strict=True):
            each, at = silent[which], places[which]
            if outcome == 1.0 and each.episode_id not in found:
                state = replace(each.states[at], expert=action)
                found[each.episode_id] = replace(each, states=(*each.states[:at], state, *each.states[at + 1 :]))
        return found

    def _continued(self, branches: Sequence[tuple[Trajectory, int, TokenIds]], number: int) -> list[float]:
        """The outcomes where at a state another action is played, and the policy goes on from there."""
        rollouts = self._stage.rollouts
        resumed = Rollouts(Resumed(rollouts.world), rollouts.protocol)
        tasks = [self._conversation(*branch) for branch in branches]
        over = [isinstance(each, float) for each in tasks]
        running = [each for each in tasks if isinstance(each, Task)]
        attempts = resumed.attempts(self._network(), running, [1.0] * len(running), self._generator(number, 5))
        ends = iter([attempt.outcome for attempt in attempts])
        return [task if is_over else next(ends) for task, is_over in zip(tasks, over, strict=True)]  # type: ignore[misc]

    def _conversation(self, trajectory: Trajectory, at: int, action: TokenIds) -> Task | float:
        """The task up to and with the action; its outcome where nothing follows."""
        rollouts = self._stage.rollouts
        assert trajectory.task is not None
        place = TaskId.parse(trajectory.task)
        task = rollouts.world.task(place.split, place.index)
        episode, messages = rollouts.world.open(task), list(task.messages)
        for tokens in (*(state.policy_actions[0].token_ids for state in trajectory.states[:at]), action):
            message = _message(rollouts.protocol, tokens)
            results = [] if message is None else episode.play(message)
            if message is None or not results or episode.is_done:
                return episode.outcome()
            messages += [message, *results]
        return replace(task, messages=tuple(messages))


def measured(stage: Stage, network: Any) -> tuple[float, float]:
    """Mean outcome in % at temperature 1, and greedy."""
    tasks = stage.tried
    temperatures = [1.0] * len(tasks) + [0.0] * len(tasks)
    generator = torch.Generator().manual_seed(1_000_000 * stage.scene.seed + 2)
    outcomes = [each.outcome for each in stage.rollouts.attempts(network, tasks + tasks, temperatures, generator)]
    return 100 * fmean(outcomes[: len(tasks)]), 100 * fmean(outcomes[len(tasks) :])


# ---------------------------------------------------------------------------------------------- states


def _as_policy_actions(
    state: State, completions: Sequence[Completion], protocol: ChatProtocol
) -> tuple[PolicyAction, ...]:
    """Held against the expert's action by meaning alone: the world has moved on."""
    expert = None if state.expert is None else _action(protocol, state.expert)
    return tuple(
        PolicyAction(
            f"{state.id}/sample",
            each.token_ids,
            each.logprobs,
            None if expert is None else compare(_action(protocol, each.token_ids), expert).agrees,
        )
        for each in completions
    )


def _action(protocol: ChatProtocol, token_ids: TokenIds) -> Action:
    return protocol.parse(token_ids, FinishReason.STOP)


def _message(protocol: ChatProtocol, token_ids: TokenIds) -> Message | None:
    action = _action(protocol, token_ids)
    return None if isinstance(action, MalformedAction) else action_message(action)


def _different(actions: Sequence[PolicyAction]) -> list[PolicyAction]:
    """Each of the samples once, but for what was done there: the first."""
    return list({action.token_ids: action for action in actions if action.token_ids != actions[0].token_ids}.values())


def _confirmed(trajectory: Trajectory) -> Trajectory:
    """The expert's answers alone with which some sample agrees."""
    states = (
        state if any(action.agrees for action in state.policy_actions) else replace(state, expert=None)
        for state in trajectory.states
    )
    return replace(trajectory, states=tuple(states))


def _answered_everywhere(trajectory: Trajectory) -> Trajectory:
    """As if a person had answered at each state: the learner leaves out other answers behind a slip."""
    return replace(trajectory, states=tuple(replace(state, is_correction=True) for state in trajectory.states))


def _without_expert(trajectory: Trajectory) -> Trajectory:
    """Nobody has answered; so nobody knows either whether the action agrees."""
    states = (
        replace(
            state, expert=None, policy_actions=tuple(replace(action, agrees=None) for action in state.policy_actions)
        )
        for state in trajectory.states
    )
    return replace(trajectory, states=tuple(states))


def _aged(trajectory: Trajectory, num_versions: int) -> Trajectory:
    states = (
        replace(
            state,
            policy_actions=tuple(replace(action, num_versions_old=num_versions) for action in state.policy_actions),
        )
        for state in trajectory.states
    )
    return replace(trajectory, states=tuple(states))


# ---------------------------------------------------------------------------------------- hard negatives


def with_hard_negatives(demonstrations: Sequence[Trajectory], protocol: ChatProtocol) -> tuple[Trajectory, ...]:
    """At each state, beside the policy's samples, the expert's call with one argument changed to what experts put
    there elsewhere: GAD's hard negatives (arXiv 2511.10643)."""
    calls = [
        call
        for each in demonstrations
        for state in each.states
        if isinstance(action := _action(protocol, state.expert or ()), ToolCalls)
        for call in action.calls
    ]
    values = {(call.name, key): dict[str, Any]() for call in calls for key in call.arguments}
    for call in calls:
        for key, value in call.arguments.items():
            values[call.name, key][repr(value)] = value
    draw = Random("hard negatives")

    def harder(state: State) -> State:
        action = _action(protocol, state.expert or ())
        if not isinstance(action, ToolCalls) or len(action.calls) != 1 or not action.calls[0].arguments:
            return state
        call = action.calls[0]
        key = draw.choice(sorted(call.arguments))
        others = [value for text, value in values[call.name, key].items() if text != repr(call.arguments[key])]
        if not others:
            return state
        changed = ToolCall(call.id, call.name, {**call.arguments, key: draw.choice(others)})
        _, tokens = protocol.completion_of(_ASKED, ToolCalls((changed,)))
        negative = PolicyAction(f"{state.id}/changed", tokens, (), agrees=False)
        return replace(state, policy_actions=(*state.policy_actions, negative))

    return tuple(replace(each, states=tuple(map(harder, each.states))) for each in demonstrations)


_ASKED: list[Message] = [{"role": "user", "content": "?"}]
