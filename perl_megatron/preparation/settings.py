"""The settings of `tools/prepare_mantis.py`: a section for each stage, read as configs are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from perl_megatron.config.endpoint_section import EndpointConfig
from perl_megatron.config.question_sections import DataConfig
from perl_megatron.config.section import Section, as_texts

PAPER_HISTOGRAM = (12.0, 11.0, 11.5, 12.0, 15.0, 17.5, 6.0, 5.0, 4.0, 3.0, 3.0)
"""PeRL's accuracies after its filter, 0.0 to 1.0 in steps of 0.1: percentages read off its figure (±1 each), so that
their sum is 100 but for rounding. Only their proportions count."""


def as_numbers(value: object) -> object:
    """A list of numbers may be written as one text, with commas."""
    try:
        return tuple(float(str(part)) for part in as_texts(value))  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return value


Kind = Literal["choice", "open"]
QuestionType = Literal["ReferenceComparison", "Other"]


class SourceSettings(Section):
    """The local copy of Mantis-Instruct, or of any data in its form."""

    path: Path
    """A table (parquet, Arrow, JSON), or a folder with tables in its subfolders."""
    images: Path | None = None
    """Folder of the images that rows only name by path; None: the folder of each table, and the zip files in it."""
    follow_links: bool = False
    """Those images may be symbolic links that leave the folder, as in a cache of the Hugging Face hub."""
    exclude: Annotated[tuple[str, ...], BeforeValidator(as_texts)] = ()
    """Tables whose path matches one of these patterns are left out, such as '*/llava_665k_multi/*'."""
    turns: Literal["first", "all"] = "first"
    """Of a conversation with several questions: only the first one, or each as a question of its own, over all images
    shown up to it. Later questions may lean on earlier answers, which a question of its own does not show."""


class RuleSettings(Section):
    """The rule filter: what can be a multi-image question with a checkable answer."""

    kinds: Annotated[tuple[Kind, ...], BeforeValidator(as_texts)] = ("choice", "open")
    """'choice': the text lists options by letter, and the answer is one of them; 'open': all others."""
    min_images: int = Field(default=2, ge=0)
    """Fewer images have no order."""
    max_images: int = Field(default=8, ge=1)
    """At 262,144 pixels an image has up to 334 tokens: eight of them, a question and a response of 2,048 tokens stay
    within the paper's 8,192 prompt tokens with room to spare."""
    min_question_characters: int = Field(default=10, ge=0)
    """Shorter texts (without placeholders and options) are no questions."""
    max_question_characters: int = Field(default=2000, ge=1)
    """Longer ones are mostly documents and dialogues."""
    max_answer_characters: int = Field(default=200, ge=1)
    """Longer open answers are captions and stories, which no option says in full."""
    min_latin_share: float = Field(default=0.9, ge=0, le=1)
    """The least share of Latin letters among all letters; the prompts of the stages are English. 0: any script."""
    drop_duplicates: bool = True
    """Drop a question whose images (by content), text and answer were seen before."""


class LanguageModelSettings(Section):
    """What the stages that ask a language model have in common."""

    prompt: Path | None = None
    """Markdown file with the headings '# System' and '# User'; None: the one that comes with the package."""
    with_images: bool = False
    """Show the images too; the endpoint's model then has to be one that sees."""
    max_tokens: int = Field(default=1024, ge=1)
    """Replies are cut at this length."""
    temperature: float = Field(default=0.0, ge=0)
    """Sampling temperature."""


class RephraseSettings(LanguageModelSettings):
    """Open questions become multiple choice."""

    min_options: int = Field(default=2, ge=2)
    """A reply with fewer options is dropped."""
    max_options: int = Field(default=6, ge=2, le=26)
    """A reply with more options is dropped."""
    keep_types: Annotated[tuple[QuestionType, ...], BeforeValidator(as_texts)] = ("ReferenceComparison", "Other")
    """Which types of rephrased questions are kept."""


class DifficultySettings(Section):
    """How often a policy answers each question right."""

    policy: Path | None = None
    """Config of a run (as for `perl-megatron eval`) whose policy answers, with the engine of its `rollout` section and
    the prompt and pixel bounds of its `data` section. None: the endpoint of policy_endpoint answers."""
    num_rollouts: int = Field(default=10, ge=1)
    """Responses to each question; the paper's ten."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling threshold."""
    max_response_tokens: int = Field(default=2048, ge=1)
    """Responses are cut at this length."""
    questions_at_once: int = Field(default=32, ge=1)
    """Questions in one call of an engine; so many are asked again after an interruption."""
    system_prompt: str = DataConfig.model_fields["system_prompt"].default
    """For an endpoint: the system message."""
    min_pixels: int = Field(default=3136, ge=784)
    """For an endpoint: images are enlarged to this area at least."""
    max_pixels: int = Field(default=262144, ge=784)
    """For an endpoint: images are reduced to this area at most (the paper's), before they are sent."""


class ResampleSettings(Section):
    """Which questions are kept, by their accuracy."""

    histogram: Annotated[tuple[float, ...], BeforeValidator(as_numbers)] = PAPER_HISTOGRAM
    """Weights of equally spaced accuracies from 0 to 1; questions count for the nearest one. Only proportions count."""
    size: int | None = Field(default=None, ge=1)
    """Questions to keep; None: as many as the histogram allows without repeating any."""
    allow_repeats: bool = False
    """Repeat questions where there are too few of an accuracy."""


class LabelSettings(LanguageModelSettings):
    """Does the order of the images change the answer?"""


class OutputSettings(Section):
    """The final records, and what is drawn on the way to them."""

    templates: Path | None = None
    """YAML file of contract templates (docs/permutation.md); None: the one that comes with the package."""
    keep_unpermutable: bool = True
    """Keep records whose images must not move; training asks them in their one order."""
    seed: int = Field(default=0, ge=0)
    """Seed of everything that is drawn: options' places, rollouts, the resampling."""


class PreparationSettings(Section):
    """All settings."""

    source: SourceSettings
    rules: RuleSettings = RuleSettings()
    rephrase: RephraseSettings = RephraseSettings()
    difficulty: DifficultySettings = DifficultySettings()
    resample: ResampleSettings = ResampleSettings()
    label: LabelSettings = LabelSettings()
    output: OutputSettings = OutputSettings()
    endpoint: EndpointConfig = EndpointConfig()
    """Of the language model that rephrases and labels."""
    policy_endpoint: EndpointConfig = EndpointConfig()
    """Of the policy whose answers say how difficult a question is."""
