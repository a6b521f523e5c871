"""Messages of the library, which name fields, in the words of the command line, which has flags."""

import argparse
import re

from .flags import add_generate_flags


def spoken(text: str) -> str:
    """The library's message in the command line's words: guidance_scale=7.5 is --guidance-scale 7.5 here.

    Quoted words are the user's and stay, and so do names after "FILE: ", which are those in the file.
    """
    generate = argparse.ArgumentParser(add_help=False)
    add_generate_flags(generate)
    actions = [action for action in reversed(generate._actions) if action.option_strings]
    first = {action.dest: action for action in actions}
    valued = first | {action.dest: action for action in actions if action.nargs != 0}

    def flag(match: re.Match[str]) -> str:
        name, value, bare = match.group("name", "value", "bare")
        if name is None:
            return match[0] if bare is None else first[bare].option_strings[0]
        action = first[name] if value == "True" else valued[name]
        simple = re.fullmatch(r"""["'[]?([\w./, -]+)["'\]]?""", value)
        told = "" if action.nargs == 0 else simple[1].replace(", ", ",") if simple else action.metavar
        return f"{action.option_strings[0]} {told}".rstrip()

    value = r"""["'][^"']*["']|\{[^}]*\}|\[[^]]*\]|\([^)]*\)|[\w.]*"""
    with_value = rf"(?<![\w./-])(?P<name>{'|'.join(first)})=(?P<value>{value})"
    bare = rf"(?<!: )\b(?P<bare>{'|'.join(name for name in first if '_' in name)})\b"
    return re.sub(rf"(?<!\w)'[^']*'(?!\w)|{with_value}|{bare}", flag, text)
