"""Pure values and bytes: no input or output, no clock, no Twisted.

The protocol: `wire` and `packed` are its values, `operations` its requests and replies,
`messages` what goes around them, `trace` the lines for programs in the log.

The store: `path`, `hashes`, `nar`, `export` (a NAR with what belongs to it), `derivation`,
`references` (finding them in files).

Servers and keys: `narinfo`, `narinfocache`, `servers`, `sexp` (keys and signatures), `scheme`
(lists in derivations), `sizes` (numbers for people).
"""
