#!/usr/bin/env bash
# The dual encoder's graph on a laptop: trains dual-encoder-tiny in its two phases and scores it on pictures that it never saw.
#
#   examples/dual_encoder/tiny.sh            at most 8 minutes on two cores, downloads included
#   examples/dual_encoder/tiny.sh --smoke    the same steps on a few samples, to see that they work
#
# Other options: --help. Ends with a table of held-out figures (results.json); fails if one is not far above its
# baseline, but not with --smoke.
. "$(dirname "$0")/../two_phases.sh"
two_phases dual_encoder/tiny.sh dual_encoder dual-encoder-tiny "$@"
