#!/usr/bin/env bash
# VLM-14B's graph on a laptop: trains vlm-tiny in its two phases and scores it on pictures that it never saw.
#
#   examples/vlm_14b/tiny.sh            at most 8 minutes on two cores, downloads included
#   examples/vlm_14b/tiny.sh --smoke    the same steps on a few samples, to see that they work
#
# Other options: --help. Ends with a table of held-out figures (results.json); fails if one is not far above its
# baseline, but not with --smoke.
. "$(dirname "$0")/../two_phases.sh"
two_phases vlm_14b/tiny.sh vlm vlm-tiny "$@"
