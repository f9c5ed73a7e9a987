#!/bin/sh
# Everything behind the shipped heads, from nothing: prompts, rollouts, heads, and every figure, table and plot of them.
# Run by `make heads` from the project's root. Takes some hours on two cores; what is there already is not done again,
# but for the training, which takes half a minute a head. SHP names the prompts of the RE-Control paper's second test
# set (JSON lines with `preferred` responses), which this project may not ship; without it that set is left out.
set -eu
recontrol="$1"
SHP="${SHP:-../shared/data/shp_prompts.jsonl}"
own=value_models/prompts/prompts.jsonl
cheap='prompting,best of,RE-Control,static vector'

"$recontrol" prompts real-toxicity-prompts --out runs/rtp.jsonl
"$recontrol" rollouts --num-samples 16
"$recontrol" rollouts --prompts runs/rtp.jsonl --num-samples 12 --max-tokens 32 --out runs/rtp
"$recontrol" rollouts --formats chat --num-samples 3 --max-tokens 96 --out runs/long
"$recontrol" rollouts --model gemma-3-270m --formats text --num-samples 8 --max-tokens 40 --out runs/gemma

train() { "$recontrol" train --name "$1" --reward "$1" --description "$2" $3; }
train positive 'Positive, cheerful text (VADER sentiment)' ''
train plain 'Plain language: short sentences, short words (Flesch reading ease)' ''
train neutral 'A neutral, matter-of-fact tone (share of the text that VADER finds neutral)' ''
train relevance 'Responses that stay with the prompt (cosine of sentence embeddings)' ''
train brevity 'Short answers (words of the response)' '--rollouts runs/long'
train nontoxic 'Text without insults, threats or swear words (the classifier of alt-profanity-check)' \
    '--rollouts runs/rtp --prompts runs/rtp.jsonl'
train plain 'Plain language: short sentences, short words (Flesch reading ease)' '--rollouts runs/gemma --damping 1'

measure() { "$recontrol" eval "$@" --update-card; }
toxic='--rollouts runs/rtp --prompts runs/rtp.jsonl --formats text --max-tokens 32'
long='--rollouts runs/long --max-tokens 96'
measure positive
measure nontoxic $toxic --num-samples 8
measure brevity $long --methods "$cheap"
for head in plain neutral relevance; do measure $head --methods "$cheap"; done
measure positive --study map
measure nontoxic $toxic --study stress --num-samples 2
measure brevity $long --study stress --max-prompts 32 --num-samples 2
for head in positive plain neutral relevance; do measure $head --study stress --max-prompts 32 --num-samples 2; done
measure plain --model gemma-3-270m --rollouts runs/gemma --formats text --max-tokens 40 --methods 'static vector'
if [ -f "$SHP" ]; then
    shp="--prompts $SHP --split all --max-prompts 64 --num-samples 2 --tuning-prompts $own"
    for head in positive plain neutral relevance; do measure $head $shp --methods 'prompting,best of,static vector'; done
    measure brevity $long $shp --methods 'prompting,best of,static vector'
fi

"$recontrol" heads report --into README.md
"$recontrol" heads report --into value_models/pretrained/SmolLM2-135M-Instruct/README.md
