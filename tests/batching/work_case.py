"""Work to be planned, for tests; light to import."""

import random

from perl_megatron.batching.work import ViewWork


def numbered(views):
    """The views with sequence indices of their own, not in their order."""
    total = sum(len(responses) for _, responses, _ in views)
    indices = iter(reversed(range(total)))
    return [
        ViewWork(tuple(sorted(next(indices) for _ in responses)), prompt, tuple(responses), tuple(images))
        for prompt, responses, images in views
    ]


def questions(number, *, seed=0, views=2, rollouts=6):
    """Realistic work: two to four images a question, prompts as long as they make them, ragged responses."""
    chance = random.Random(seed)
    work = []
    for question in range(number):
        images = [(f"{question}-{slot}", chance.choice([800, 1000, 1320])) for slot in range(chance.randint(2, 4))]
        prompt = sum(patches for _, patches in images) // 4 + chance.randint(40, 200)
        for _ in range(views):
            responses = [min(2048, 1 + int(chance.lognormvariate(5.8, 0.6))) for _ in range(rollouts)]
            work.append((prompt, responses, images))
    return numbered(work)
