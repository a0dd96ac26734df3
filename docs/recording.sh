# The session that `make recording` records for README: two commands of the quickstart, typed as a person would.
# The service runs already, so nothing is loaded while the recording goes on.

say() {
  printf '\033[32m$\033[0m '
  for ((i = 0; i < ${#1}; i++)); do
    printf '%s' "${1:i:1}"
    sleep 0.02
  done
  sleep 0.4
  printf '\n'
  eval "$1"
  sleep 1.5
}

cd examples/quickstart
say "model-compose plan" 2>/dev/null  # a progress bar, of which nothing would be seen but the time
say "model-compose run --input 'Why is the sky blue?' --blend alpaca=1 --stream"
say "model-compose run --input 'Why is the sky blue?' --blend alpaca=0.5,pirate=1.25 --stream"
