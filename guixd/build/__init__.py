"""What is built, when, by whom and how.

A request: `engine` gets a `request`, `plan` finds its goals, and `goals` carries them out, in
the order of `chains`, which knows `durations`; `protection` keeps collectors away.

A derivation, for all who want it: `shared`, a `job` whose clients have `patience`; `claims` and
`scheduler` say whose turn it is, `diskspace` whether there is room, `broadcast` tells everybody,
and `workshop` has what every build uses.

An attempt: `attempt` waits for `users` and for `foreign` locks; `trial` is one run of the builder,
for which `workspace` makes directories, `targets` chooses where it writes, `graphs` looks up what
it asks for and `container` decides what it sees.  `launcher` and `zygote` start what `program`
makes of that; `builder` is the process, with its `watchdog`, its `cgroups` and its `uplink`, and
`setups` explains why there is none.

Its end: `logs` and `lastwords` are what it wrote, `verdicts` and `results` what that means;
`outputs` checks what it made, under the `constraints` of the derivation, and `delivery` takes it
in.  `contents` looks into items, `leftovers` removes what dead daemons left.

Downloads are `builtins`, with `downloadtools`: `download` does what `downloadinputs` reads, with
the mirrors of `mirrorcode`, and fills a `draft`; `gitdownload` runs Git in a `gitbox`, or else
`gitfallback` asks `narfallback` and `heritage`, whose archives `treebox` unpacks, as it does for
`disarchive`.  `boxes` are for programs of the daemon's own.

Substitutes: `available` finds out what `servers` have of a request, `substitutes` who takes part
in which `substitution`; `lanes` let a `transfer` begin, `watchers` hear of it, `directories` are
servers on this machine, and `keywarnings` tell why nothing is taken.

Everywhere: `threads` and `turns`, for what takes long.
"""
