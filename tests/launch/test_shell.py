"""The words of a script: what bash starts, and what `trace` says that it starts."""

import subprocess
from pathlib import Path

import pytest

from megatron_s3.launch.shell import UNKNOWN, Char, value
from megatron_s3.launch.trace import trace

SHOW = '#!/bin/bash\nprintf "%s\\x1f" "$#" "$@" >> "$CALLS"; printf "\\x1e" >> "$CALLS"\n'

# Each starts `show` with words that do not depend on anything outside.
SCRIPTS = [
    # quotes and escapes
    r"""show a\ b \# a\;b 'a'\''b' "a\"b\$c\\d\`e\f" c"d"'e' "" ''""",
    "show a\\\nb \"c\\\nd\" 'e\\\nf'",
    r"""show $'a\tb\n\'\\\q' $"x y" "$" a$ $. """,
    'show a#b "a"#b a# # c\nshow b;# c\nshow \\\n  # c\nshow d \\\n\n',
    "show [a] {} a{b}c } if then ! = == @ % ^ + ,\nshow é 'ü'ö",
    'show a\x0bb a\xa0b "a\nb"',
    # parameters
    'A=x; show "${A:+--x "$A"}" "${A:+y}" ${A:+a b} ${A+z} "$A"y $A"y" "${A}y"',
    """show "${A:-a b}" ${A:-a b} "${A:-"a b"}" ${A:-"a b"} "${A:-'q'}" ${A:-'q r'} ${A:-x\\}y}""",
    'show "${A:-\\"q\\" \\$ \\} \\x}" ${A:-"}"} "${A:-${B:-c d}}" ${A:-} "${A:-}" ${A-} "${A-}"',
    'A=; show "${A-x}" "${A:-y}" ${A:+z} "${A:+z}" "${A+z}"; show ${A:+z}',
    'A=" a  b "; show $A "$A" x$A y"$A"z x${A}y',
    'A="a\\\nb" B=$A; C="$B c"; show $C "$C"; A+=d; show "$A"',
    ': ${A:=1} "${B:=x y}" ${A:=2}; C=; : ${C=3}; show "$A" "$B" "$C"; D=${E:=4}; show $D "$E"',
    # arrays
    'A=(a "b c" \'\' d); show "${A[@]}"; show ${A[@]}; show "${A[*]}"; show ${A[*]} "x${A[@]}y"',
    'A=(a "b c"); show ${A[1]} "${A[1]}" $A "${A[0]}" "${A[5]}"; B="${A[*]}" C=("${A[@]}" e)',
    'A=(a b); A[0]=z; show "${A[@]}"; A[1]+=y; show "${A[@]}"; A+=d; A+=(e); show "${A[@]}"',
    'A[0]=x; A[1]=y; A=z; show "${A[@]}"; A=(a # c\n b \\\n c\n); show "${A[@]}"',
    'A=(a); show ${A[1]:=b} ${A[0]:=c}; show "${A[@]}"',
    'A=(); show "${A[@]}"; show "${A[@]}" x ${A[@]} "x${A[@]}" "${A[@]:-y}"; A=(a); show ${A[@]+b}',
    # arguments
    'set -- a "b c"; show "$@" $# $1 "$2" "$3"; show "$*"; show x"$@"y $* $4; A="$@"; show "$A"',
    'set --; show "$@"; show "$@" "x$@" "$1" $1 "${1-y}"',
    'f() { local x=$1; shift; show $x "$@"; }; f a "b c" d; f a',
    'f() { set -- x "$@"; show "$@"; }; f a; f; set -- y; for x; do show $x; done',
    'f() { for x in "$@"; do show "$x"; done; }; f a "b c"',
    # scope
    "A=1; f() { A=2; }; f; show $A; (A=3); show $A; B=$(A=4); show $A; A=5 show $A; show $A",
    'A=1 B=; f() { local A=2 B; B=3; show $A; g; }; g() { show $A $B; A=4; }; f; show $A "$B"',
    "A=1; f() { declare A=2; declare -g B=3; export C=4; return; A=5; }; f; show $A $B $C",
    "A=; f() { show $A; A=6; }; A=5 f; show x$A; A=1; A=5 f; show $A; f() (return); f; show $A",
    'f() { A=7; return; A=8; }; f; show $A; A=9 eval "show $A"',
    "declare -x A=1; declare B=2 C; export C; C=3; bash -c 'show $A $C'",
    # commands
    'export A=1; bash <<E\nshow "a $A" \\$A \\\\ "b\\\nc" # "\nE',
    "bash <<'E'\nA='b  c'; show $A\nE\nbash <<< 'show a'; show '<(a)' \"<(a)\" \">(b)\"",
    "show a > /dev/null b; > /dev/null show c; &> /dev/null show c",
    "show 2 2> /dev/null; show d 2>&1 e &> /dev/null",
    "time -p show a; ! show b; time show c; { show d; show e; }; (show f)",
    '[[ "a ]] b" == x ]]; [[ a =~ ^(a|b)$ && ( b < c ) ]] && show a; ((1 << 2)); show b',
    "for ((i = 0; i < 2; i++)); do show a; done; show b",
    'for x in a "b c"; do show "$x"; done; A="d e"; for x in $A; do show $x; done; show $x',
    "case x in (x) show a ;; esac; case x in x | y) show b ;& z) show c;; esac",
    "f() if true; then show a; fi; f; function g { show b; }; g; function h() (show c); h",
    'OUT=`cd /; echo \\`show a\\` "b"`; OUT=$(show c # )\n); OUT=$(case x in x) show d;; esac)',
    "eval show a '\"b c\"'; bash -c \"show 'a b'\"; CMD='show a'; $CMD b; exec show c; show d",
    "show $((1)) > /dev/null; show $[ (1 + 2) * 3 ] b; f() { exit; }; (f); f; show c",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_starts_what_bash_starts(script: str, tmp_path: Path) -> None:
    (tmp_path / "show").write_text(SHOW)
    (tmp_path / "show").chmod(0o755)
    (tmp_path / "calls").touch()
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(tmp_path / "calls"), "LC_ALL": "C"}
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, check=False)
    wanted = [
        call.split("\x1f")[1:-1] for call in (tmp_path / "calls").read_text().split("\x1e")[:-1]
    ]
    found = [
        [value(word) for word in command.words[1:]]
        for command in trace(script, ["show"]).commands
        if value(command.words[0]) == "show"
    ]
    if "$#" in script or "$((" in script:  # bash alone knows these numbers
        wanted = [
            [ours if ours == UNKNOWN else theirs for ours, theirs in zip(*pair, strict=True)]
            for pair in zip(found, wanted, strict=True)
        ]
    assert found == wanted


def test_an_escaped_character_has_the_place_of_its_backslash() -> None:
    (command,) = trace("show \\a", ["show"]).commands
    assert command.words[1] == (Char("a", 5, 7),)


def test_the_ends_of_a_script_are_those_of_all_its_paths() -> None:
    script = """
    (A=1; exit)
    f() { A=2; if [ "$X" ]; then return; fi; g; A=3; }
    g() { (exit); return; }
    f; B=$A
    if [ "$Y" ]; then A=4; exit; fi
    if [ "$Z" ]; then A=5; return; fi
    A=6
    """
    ends = [end.variables for end in trace(script, ["show"]).ends]
    assert {value(end["A"][0]) + value(end["B"][0]) for end in ends} == {
        "42", "43", "52", "53", "62", "63",
    }  # fmt: skip
