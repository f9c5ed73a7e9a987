"""`recontrol heads list | show | import | publish`: value heads as files."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, FiniteFloat
from pydantic_settings import CliPositionalArg

from server.cli.command import Command
from server.cli.program import command_line
from server.errors import ConfigurationError, UnknownHeadError
from server.logs import printable, printable_json
from server.settings import DEFAULT_MODEL, HeadsLocation
from value_models.errors import HeadFileError
from value_models.head_folder import HeadFolder, LocalHeads, open_heads
from value_models.importer import import_pth, import_vector
from value_models.store import NAME_PATTERN, BaseModelCard, HeadCard, architecture_card, save_head, shipped_heads_folder

_VECTORS = (".gguf", ".safetensors")


class HeadsCommand(Command):
    heads_dir: HeadsLocation | None = Field(
        None, description=f"folder of heads, or a URL of fsspec; by default those shipped for {DEFAULT_MODEL}"
    )

    @property
    def location(self) -> str | Path:
        return self.heads_dir or shipped_heads_folder(DEFAULT_MODEL)

    def heads(self) -> HeadFolder:
        try:
            return open_heads(self.location)
        except HeadFileError as error:
            raise ConfigurationError(f"heads_dir: {error}") from error

    def names(self) -> list[str]:
        try:
            return self.heads().names()
        except HeadFileError as error:
            raise ConfigurationError(f"heads_dir: {error}") from error

    def cards(self) -> list[HeadCard]:
        heads = self.heads()
        return [heads.card(name) for name in self.names()]

    def check(self, name: str) -> None:
        if name not in (names := self.names()):
            raise UnknownHeadError(name, names)


class HeadsList(HeadsCommand):
    """List the value heads of a folder."""

    def cli_cmd(self) -> None:
        heads, unreadable = self.heads(), list[HeadFileError]()
        for name in self.names():
            try:
                card = heads.card(name)
            except HeadFileError as error:
                unreadable.append(error)
            else:
                print(printable(f"{card.name:16}{card.base_model.name:28}{card.description}"))
        if unreadable:
            others = f" ({len(unreadable) - 1} more cannot be read)" if unreadable[1:] else ""
            raise HeadFileError(f"{unreadable[0]}{others}")


class HeadsShow(HeadsCommand):
    """Print a head's card."""

    name: CliPositionalArg[str]

    def cli_cmd(self) -> None:
        self.check(self.name)
        print(printable_json(self.heads().card(self.name).model_dump_json(indent=2)))


class HeadsPublish(HeadsCommand):
    """Copy a head to where servers read it, in the order in which none of them takes a half of it."""

    name: CliPositionalArg[str]
    to: str = Field(min_length=1, description="folder, or a URL of fsspec such as s3://bucket/heads")

    def cli_cmd(self) -> None:
        self.check(self.name)
        open_heads(self.to).publish(self.name, self.heads())
        print(f"Published {self.name} to {self.to}")


class HeadsImport(HeadsCommand):
    """Make a head of a value function of the RE-Control paper's code, or of a steering vector.

    A value function is a .pth with two or three layers. A steering vector, in a .gguf of repeng or llama.cpp or in a
    .safetensors, becomes a linear head.
    """

    path: CliPositionalArg[Path]
    name: str = Field(pattern=NAME_PATTERN, description="the head's name in requests")
    base_model: str = Field(
        description="name of the language model that the head was trained on; models of other names refuse it"
    )
    description: str = Field("", description="what the head is for, shown in /v1/heads")
    tensor: str | None = Field(
        None, description="which vector of the file; by default the only one, or the last layer's"
    )
    scale: FiniteFloat | None = Field(
        None, gt=0, description="length of a step of size one over the vector's; by default 1"
    )

    def cli_cmd(self) -> None:
        if not isinstance(self.heads(), LocalHeads):
            raise ConfigurationError("heads_dir: import into a folder of this machine, then `recontrol heads publish`")
        if self.path.suffix in _VECTORS:
            vector = import_vector(self.path, self.tensor)
            head, source = vector.head(scale=self.scale or 1.0), f"{self.path.name}, {vector.tensor}"
            metric = f"a step of length 1 adds {self.scale or 1.0:g} times the vector, not calibrated"
        else:
            if self.tensor is not None or self.scale is not None:
                raise ConfigurationError(f"tensor, scale: only with a file of vectors ({', '.join(_VECTORS)})")
            head, source = import_pth(self.path).head(), self.path.name
            metric = "identity, steps not calibrated"
        unknown = "unknown: imported"
        card = HeadCard(
            name=self.name,
            description=self.description or f"Imported from {self.path.name}",
            base_model=BaseModelCard(name=self.base_model, hidden_size=head.hidden_size),
            architecture=architecture_card(head),
            normalisation="none",
            metric=metric,
            reward=unknown,
            reward_mean=0.0,
            reward_scale=1.0,
            targets=unknown,
            data={"source": source},
            validation={},
            command=command_line(),
        )
        target = Path(self.location) / self.name
        save_head(target, head, card)
        print(f"Imported a head of type {head.type_name} and hidden size {head.hidden_size} into {target}")
