"""The answers behind the page, as plain values that JSON can hold; nothing here knows of HTTP."""

from __future__ import annotations

import math
import threading
import time
import unicodedata
from typing import Any, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from genrec.data.sequences import load_sequences, take_users
from genrec.data.split import targets_of
from genrec.data.vocabulary import encode_events, load_vocabulary
from genrec.demo_ui.explanation import explain
from genrec.demo_ui.question import LIMITS, Question
from genrec.generation import Recommender, RecommenderConfig
from genrec.generation.recommender import Mode
from genrec.generation.requests import Request
from genrec.generation.storage import TrainedRun
from genrec.interfaces import OOV, EventSequences

SHOWN = 200  # events of a history that the page gets
SAME = 1e-3  # log-probabilities closer than this are one: one comes from a batch of beams, the other from its own pass


class _Ranked(NamedTuple):
    """One pass of the model."""

    items: NDArray[np.int64]  # (top_k,) best first, 0 where there are fewer
    scores: NDArray[np.float32]  # (top_k,)
    place: int | None  # of the item that was hidden, from 1; None where the ranking does not hold it
    latency_ms: float


class Demo:
    """A trained run and the log it was trained on. Threads may share it: one at a time uses the model."""

    def __init__(self, run: TrainedRun, name: str) -> None:
        self.name, self.run, self.catalogue = name, run, run.catalogue
        self.sequences = load_sequences(run.features)
        self.vocabulary = load_vocabulary(run.features)
        self.recommender = Recommender(run.model, run.settings)
        self._lock = threading.Lock()
        self._codes = run.model.codes.cpu().numpy()
        self._index = {item_id: index for index, item_id in enumerate(self.catalogue.item_ids) if index}
        self._rows = {user: row for row, user in enumerate(self.sequences.user_ids)}
        self._titles = [folded(title) for title in self.catalogue.titles]
        self._users = [(user, user.casefold()) for user in self.sequences.user_ids]
        self._popular = np.argsort(-self.catalogue.counts[1:], kind="stable") + 1  # item indices
        self.recommend(Question(None, (self.catalogue.item_ids[1],), False, run.settings))  # the first pass is slow

    def about(self) -> dict[str, Any]:
        """The run and what may be asked of it."""
        model, settings = self.run.model, self.run.settings
        return {
            "name": self.name,
            "items": self.catalogue.size,
            "users": len(self.sequences),
            "levels": list(model.vocabulary.codebook_sizes),
            "reads": model.config.max_events,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "metrics": self.run.metrics,
            "modes": get_args(Mode),
            "limits": LIMITS,
            "defaults": {**_shown(settings), "top_k": min(settings.top_k, self.catalogue.size)},
        }

    def users(self, words: str, offset: int, limit: int) -> dict[str, Any]:
        """Users whose id holds `words`, those that begin with it first, in the order of the log."""
        wanted = words.strip().casefold()
        found = [row for row, (_, user) in enumerate(self._users) if wanted in user]
        if wanted:
            found.sort(key=lambda row: (self._users[row][1] != wanted, not self._users[row][1].startswith(wanted)))
        lengths = np.diff(self.sequences.cu_events)
        rows = [{"id": self._users[row][0], "events": int(lengths[row])} for row in found[offset : offset + limit]]
        return {"total": len(found), "users": rows}

    def items(self, words: str, offset: int, limit: int) -> dict[str, Any]:
        """Items whose title holds every word of `words`: titles that begin so first, then the most popular."""
        wanted = folded(words).split()
        found = [index for index in self._popular if all(word in self._titles[index] for word in wanted)]
        phrase = " ".join(wanted)
        found.sort(key=lambda index: not self._titles[index].startswith(phrase))
        return {"total": len(found), "items": [self._item(index) for index in found[offset : offset + limit]]}

    def recommend(self, question: Question) -> dict[str, Any]:
        """What comes next, and why. ValueError names a user or an item that is not there, or a history too short."""
        history, hidden = self._history(question)
        with self._lock, torch.inference_mode():
            self.recommender.config = question.settings  # read at every call; what follows from the weights stays
            request = self.recommender.request(history)
            ranked = self._rank(request, question.settings, hidden)
            items = ranked.items[ranked.items > 0]
            rows = self._explained(request, question.settings, items, ranked.scores)
            extra = [] if hidden in (None, OOV) else self._explained(request, question.settings, np.array([hidden]))
        held_out = None if hidden is None else {**(extra or [self._item(OOV)])[0], "place": ranked.place}
        return {
            "user": question.user,
            "settings": _shown(question.settings),
            "events": len(history.item_ids),
            "history": self._events(history),
            "results": [{**row, "hit": row["index"] == hidden} for row in rows],
            "held_out": held_out,
            "latency_ms": round(ranked.latency_ms, 2),
        }

    def _history(self, question: Question) -> tuple[EventSequences, int | None]:
        """The events that the model gets to see, and the item that is hidden from it."""
        if question.user is None:
            unknown = next((item for item in question.items if item not in self._index), None)
            if unknown is not None:
                raise ValueError(f"items: {unknown!r:.80} is not an item id of the catalogue")
            items = np.array([self._index[item] for item in question.items], np.int32)
            return encode_events(self.vocabulary, np.array(["you"], object), np.array([0, len(items)]), items), None
        if question.user not in self._rows:
            raise ValueError(f"user {question.user!r:.80} is not in the log; it has {len(self.sequences)} users")
        history = take_users(self.sequences, [self._rows[question.user]])
        if not question.hide_last:
            return history, None
        shorter, predicted = self.run.split.cut(history, "test")
        if predicted[0] < 0 or len(shorter.item_ids) == 0:
            raise ValueError(f"user {question.user!r} has no test event with a history before it; hide nothing")
        return shorter, int(targets_of(history, predicted)[0])

    def _rank(self, request: Request, settings: RecommenderConfig, hidden: int | None) -> _Ranked:
        top_k = min(settings.top_k, self.catalogue.size)
        begin = time.perf_counter()
        opinions = self.recommender.opinions(request.history, request.fields, top_k)
        items, scores = (best[0].cpu().numpy() for best in self.recommender.best(opinions, settings.alpha, top_k))
        latency_ms = 1000 * (time.perf_counter() - begin)
        place = None
        if hidden not in (None, OOV):
            everything = self.recommender.best(opinions, settings.alpha, self.catalogue.size)[0][0].cpu().numpy()
            place = next((int(at) + 1 for at in np.flatnonzero(everything == hidden)), None)
        return _Ranked(items, scores, place, latency_ms)

    def _explained(
        self,
        request: Request,
        settings: RecommenderConfig,
        items: NDArray[np.int64],
        scores: NDArray[np.float32] | None = None,
    ) -> list[dict[str, Any]]:
        """A row for each item. `reached` tells whether the beam search got as far as the item: an item that the item
        head alone brought in counts with the beam's last log-probability instead of its own; None without a search."""
        if len(items) == 0:
            return []
        codes, item_head = explain(self.recommender, request, torch.from_numpy(items).to(self.recommender.device))
        rows = []
        for number, index in enumerate(items):
            own, head = float(codes[number].sum()), float(item_head[number])
            row = {
                **self._item(int(index)),
                "steps": [round(math.exp(value), 6) for value in codes[number].tolist()],
                "beam": _finite(own),
                "item_head": _finite(head),
            }
            if scores is not None:
                score = float(scores[number])
                counted = score - settings.alpha * head
                reached = {"items": None, "mixed": abs(counted - own) < SAME * max(1.0, abs(score))}
                row |= {"score": _finite(score), "reached": reached.get(settings.mode, True)}
            rows.append(row)
        return rows

    def _events(self, history: EventSequences) -> list[dict[str, Any]]:
        """The last events, oldest first; `read` is False for those before the model's window."""
        first = max(0, len(history.item_ids) - SHOWN)
        window = len(history.item_ids) - self.run.model.config.max_events
        return [
            {**self._item(int(history.item_ids[at])), "rating": _finite(history.ratings[at]), "read": at >= window}
            for at in range(first, len(history.item_ids))
        ]

    def _item(self, index: int) -> dict[str, Any]:
        if index == OOV:
            return {"index": 0, "id": "", "title": "(not in the vocabulary)", "codes": None}
        return {
            "index": int(index),
            "id": self.catalogue.item_ids[index],
            "title": self.catalogue.titles[index] or self.catalogue.item_ids[index],
            "codes": self._codes[index].tolist(),
        }


def folded(text: str) -> str:
    """For comparing: without case and accents."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return " ".join("".join(letter for letter in letters if not unicodedata.combining(letter)).split())


def _shown(settings: RecommenderConfig) -> dict[str, Any]:
    shown = {name: getattr(settings, name) for name in ("beams", "alpha", "mode", "top_k")}
    return {**shown, "include_seen": not settings.exclude_seen}


def _finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return round(float(value), 5) if math.isfinite(value) else None
