"""How long questions, thoughts and answers are, and the settings that see them whole."""

from dataclasses import replace

from system.config import N_VALIDATION, Config, RLPConfig
from system.errors import require
from text.batches import problem_document, problem_tokens
from text.corpus import Corpus
from text.problems import Problem
from text.tokenizer import Tokenizer


def with_horizon(config: Config, corpus: Corpus, rooms: dict[str, int], known: int = 0
                 ) -> tuple[Config, list[str]]:
    """The settings with an rlp.horizon that sees whole answers, where thoughts stand before them;
    and lines that say so, and where contexts or sequences of training are too short. All problems
    that will be measured are drawn for that: raises ValueError if a family has too few, lacks what
    the mode needs, or asks longer than a sequence is. rooms: see `cut_problems`; known: the horizon
    of a run that goes on, which figures of more problems do not change."""
    fit, n = config.rlp, config.eval.problems_per_family
    sizes = {"train": 4, "val": min(n, N_VALIDATION), config.eval.split: n}
    problems = [p for split, size in sizes.items()
                for p in corpus.held_out(split, size, config.seed)]
    n_prompt, n_answer = _longest(corpus.tokenizer, problems)
    for p in {p.family: p for p in problems if p.scorer}.values():
        p.scorer("x"), p.scorer("")  # it must bear these; the figures at the end would tell late
    mute = sorted({p.family for p in problems if not p.thought})
    require(config.mode != "sft" or not mute, f"sft learns from worked thoughts, and the problems "
            f"of {', '.join(mute)} have none; give them `thought`, or leave them out "
            "(data.problems)")
    reads_problems = config.data.text_share + config.warmup.computed_share < 1
    rooms = {name: room for name, room in rooms.items() if reads_problems or name == "sft"}
    said = cut_problems(rooms, corpus.tokenizer, problems) if rooms else []
    if n_prompt > fit.context_len:
        said.append(f"questions take up to {n_prompt} tokens of this tokenizer, and rlp.context_len"
                    f" ({fit.context_len}) looks at the last; with --rlp.context-len {n_prompt} "
                    "they are whole")
    if known > fit.horizon and (n_answer > fit.horizon or fit.horizon == RLPConfig().horizon):
        fit = replace(fit, horizon=known)
        config = replace(config, rlp=fit)
    c = config.rollouts()
    if c.reward == "match" and config.mode in ("rlp", "rlvr") and any(p.scorer for p in problems):
        said.append("what scorers of problems accept counts in the figures; the reward of mode "
                    f"{config.mode} is for the answers themselves")
    if n_answer > fit.horizon and not known and c.positions == "answer" and (
            c.reads_problems() or config.mode != "rlp"):
        said.append(f"answers take up to {n_answer} tokens of this tokenizer: rlp.horizon is "
                    f"{n_answer} instead of {fit.horizon}, so that accuracy and reward are those "
                    "of whole answers; at text as many tokens count")
        config = replace(config, rlp=replace(fit, horizon=n_answer))
    elif n_answer > fit.horizon:
        said.append(f"answers take up to {n_answer} tokens of this tokenizer, and rlp.horizon "
                    f"({fit.horizon}) looks at the first; with --rlp.horizon {n_answer} "
                    "accuracy is that of the whole answer")
    return config, said


def cut_problems(rooms: dict[str, int], tokenizer: Tokenizer, problems: list[Problem]) -> list[str]:
    """A line for each phase whose sequences hold no problem of some family to its end. Raises
    ValueError where not even a question goes in, so that nothing is to be predicted.
    rooms: the tokens of a sequence by phase."""
    least = {}  # tokens, by family: of the shortest question, of the shortest problem
    for p in problems:
        document = problem_document(tokenizer, p, p.thought)
        sizes = len(tokenizer.encode(p.prompt)) + 1, len(document)
        least[p.family] = [*map(min, sizes, least.get(p.family, sizes))]
    question, whole = map(max, zip(*least.values(), strict=True))
    said = []
    for name, n_tokens in rooms.items():
        room = n_tokens + 1 - len(tokenizer.begin)
        line = (f"{name} cuts problems after {room} tokens; those of some family take {question} "
                f"or more for the question, {whole} with thought and answer; give a longer "
                f"{'pretrain' if name == 'pretrain' else 'warmup'}.seq_len")
        require(question <= room, line)
        if whole > room:
            said.append(line)
    return said


def worked_lengths(config: Config, corpus: Corpus) -> Config:
    """The settings with contexts and a horizon that see validation problems whole, and thoughts as
    long as the longest that is worked. Nothing else is left of `rlp`: a base that is kept for all
    its settings is measured by none of them."""
    tokenizer, default, n = corpus.tokenizer, RLPConfig(), config.eval.problems_per_family
    problems = corpus.held_out("val", min(n, N_VALIDATION), config.seed)
    n_prompt, n_answer = _longest(tokenizer, problems)
    worked = [len(tokenizer.encode(p.thought)) + 1 for p in problems if p.thought]
    return replace(config, rlp=replace(
        default, thought_len=max(worked, default=default.thought_len),
        context_len=max(default.context_len, n_prompt), horizon=n_answer))


def _longest(tokenizer: Tokenizer, problems: list[Problem]) -> tuple[int, int]:
    """Tokens of the longest prompt, and of the longest answer without its end."""
    tokens = [problem_tokens(tokenizer, p) for p in problems]
    return max(len(prompt) for prompt, _ in tokens), max(len(answer) for _, answer in tokens) - 1
