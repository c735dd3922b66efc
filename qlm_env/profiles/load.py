"""Find, read and format profiles: one YAML file per device, architecture and tp."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from qlm_env.profiles.schema import Profile
from qlm_env.spec import ConfigError, parse

SHIPPED = Path(__file__).parent / "data"

# libyaml reads the eighty shipped files in a tenth of a second, fifteen times as fast.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class ProfileKey(NamedTuple):
    """What a profile is for."""

    device: str
    architecture: str
    tp: int

    @property
    def file_name(self) -> str:
        """The file this profile is kept in, such as ``a10_llama-2-7b_tp1.yaml``."""
        return f"{self.device.lower()}_{self.architecture}_tp{self.tp}.yaml"


def load_profile(device: str, architecture: str, tp: int, directory: Path | None = None) -> Profile:
    """The profile of ``architecture`` on an instance of ``tp`` GPUs of ``device``.

    Args:
        directory: a folder with further profiles, which take precedence over the shipped ones.

    Raises:
        ConfigError: there is none (the message lists what there is for that device, or the devices), or its
            file is malformed (the message names file and key).
    """
    profile = find_profile(device, architecture, tp, directory)
    if profile is None:
        raise ConfigError(f"no profile for {architecture} on {device} tp={tp}; {_available(device, directory)}")
    return profile


def find_profile(device: str, architecture: str, tp: int, directory: Path | None = None) -> Profile | None:
    """As :func:`load_profile`, but ``None`` where there is no profile.

    Raises:
        ConfigError: the file is malformed.
    """
    key = ProfileKey(device, architecture, tp)
    # Looked up among files that exist, so that no name can lead out of the folders or depend on letter case.
    for folder in _folders(directory):
        for path in folder.glob("*.yaml"):
            if path.name == key.file_name:
                profile = read_profile(path)
                return profile if _key(profile) == key else None
    return None


def list_profiles(directory: Path | None = None) -> tuple[ProfileKey, ...]:
    """What there are profiles for, sorted.

    Raises:
        ConfigError: a file is malformed.
    """
    keys = {_key(read_profile(path)) for folder in _folders(directory) for path in folder.glob("*.yaml")}
    return tuple(sorted(keys))


def profile_yaml(profile: Profile, written_by: str) -> str:
    """The text of a profile's file; ``written_by`` is its first line, a comment."""
    values = profile.model_dump(exclude_none=True)
    for name, quantity in profile.quantities().items():
        if quantity.value.is_integer():
            values[name]["value"] = int(quantity.value)
    text: str = yaml.safe_dump(values, sort_keys=False, width=100)
    return f"# {written_by}\n{text}"


def read_profile(path: Path) -> Profile:
    """Read and validate one profile file.

    Raises:
        ConfigError: it cannot be read, is no YAML mapping, has a key wrong, or its name does not say what it
            is for; one line with file and key.
    """
    try:
        modified_ns = path.stat().st_mtime_ns
    except OSError as error:
        raise ConfigError(f"profile {path}: {error.strerror}") from None
    return _read(path, modified_ns)


@cache
def _read(path: Path, modified_ns: int) -> Profile:
    """The file as of ``modified_ns``, which is an argument so that an edited file is read again."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), LOADER)
    except OSError as error:
        raise ConfigError(f"profile {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"profile {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"profile {path}: must be a mapping of names to quantities")
    try:
        profile = parse(Profile, values)
    except ConfigError as error:
        raise ConfigError(f"profile {path}: {error}") from None
    expected = _key(profile).file_name
    if path.name != expected:
        raise ConfigError(f"profile {path}: its device, architecture and tp call for the file name {expected}")
    return profile


def _folders(directory: Path | None) -> list[Path]:
    if directory is None:
        return [SHIPPED]
    if not directory.is_dir():
        raise ConfigError(f"profile directory {directory} does not exist")
    return [directory, SHIPPED]


def _key(profile: Profile) -> ProfileKey:
    return ProfileKey(profile.device, profile.architecture, profile.tp)


def _available(device: str, directory: Path | None) -> str:
    keys = list_profiles(directory)
    here = [f"{key.architecture} tp={key.tp}" for key in keys if key.device == device]
    if here:
        return f"{device} has: {', '.join(here)}"
    return f"devices with profiles: {', '.join(sorted({key.device for key in keys}))}"
