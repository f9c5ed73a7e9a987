#!/bin/sh
# Everything behind the shipped heads, from nothing: prompts, rollouts, heads, and every figure, table and plot of them.
# Run by `make heads` from the project's root. Takes some hours on two cores; what is there already is not done again,
# but for the training, which takes some minutes a head. SHP names the prompts of the RE-Control paper's second test
# set (JSON lines with `preferred` responses), which this project may not ship; without it that set is left out.
set -eu
python="$1"
recontrol="$(dirname "$python")/recontrol"
SHP="${SHP:-../shared/data/shp_prompts.jsonl}"
own=value_models/prompts/prompts.jsonl

"$recontrol" prompts real-toxicity-prompts --out runs/rtp.jsonl
# All heads of the default model but `brevity` are of the time before training took a critic and fields, which brought
# them nothing that was to be seen in text (docs/tried.md), and before rollouts were sampled at top_p 1.
"$recontrol" rollouts --top-p 0.95 --num-samples 16
"$recontrol" rollouts --top-p 0.95 --prompts runs/rtp.jsonl --num-samples 12 --max-tokens 32 --out runs/rtp
"$recontrol" rollouts --formats chat --num-samples 4 --max-tokens 96 --out runs/long
"$recontrol" rollouts --model gemma-3-270m --formats text --num-samples 6 --max-tokens 40 --out runs/gemma

train() { # name, description, flags
    name="$1" && description="$2" && shift 2
    "$recontrol" train --name "$name" --reward "$name" --description "$description" "$@"
}
by_value='--critic value --field-features 0'
plain='Plain language: short sentences, short words (Flesch reading ease)'
positive='Positive, cheerful text (VADER sentiment)'
neutral='A neutral, matter-of-fact tone (share of the text that VADER finds neutral)'
relevance='Responses that stay with the prompt (cosine of sentence embeddings)'
train positive "$positive" $by_value
train plain "$plain" $by_value
train neutral "$neutral" $by_value
train relevance "$relevance" $by_value
train brevity 'Short answers (words of the response)' --rollouts runs/long
train nontoxic 'Text without insults, threats or swear words (the classifier of alt-profanity-check)' \
    --rollouts runs/rtp --prompts runs/rtp.jsonl $by_value
gemma='--rollouts runs/gemma --damping 1'
train positive "$positive" $gemma
train plain "$plain" $gemma
train neutral "$neutral" $gemma

# Training leaves heads uncalibrated.
for head in positive plain; do "$recontrol" calibrate $head; done
"$recontrol" calibrate brevity --max-tokens 96

measure() { "$python" -m benchmarks.quality "$@" --update-card; }
few='--methods prompting,static-vector,token-log-odds'
toxic='--prompts runs/rtp.jsonl --formats text --max-tokens 32'
stress='--study stress --max-prompts 16 --num-samples 2'
measure positive
measure positive --study map
measure positive --max-tokens 128 $few
measure plain --max-tokens 128 $few
measure positive --study seeds --num-samples 2
measure plain --study seeds --num-samples 2
measure positive --study cost --num-samples 2
measure positive,neutral,plain --study objectives --worst-case neutral+plain,positive+relevance --max-prompts 40 --num-samples 2
measure nontoxic --rollouts runs/rtp $toxic --num-samples 8
measure nontoxic $toxic --study stress --num-samples 2
measure brevity --rollouts runs/long --max-tokens 96 $few,end-token
measure brevity --max-tokens 96 $stress
measure neutral --num-samples 2 $few,word-scores
measure plain $few,word-scores,best-of,activation-steering,prompt-replacement
measure relevance $few,best-of
for head in positive plain neutral relevance; do measure $head $stress; done
for head in positive plain neutral; do
    measure $head --model gemma-3-270m --rollouts runs/gemma --formats text --max-tokens 40 --methods static-vector,token-log-odds
done
# Prompts that nothing was chosen by; strengths and instructions are those found above, whose responses are kept.
locked='--split locked --num-samples 2'
for head in positive plain; do measure $head $locked $few,word-scores,best-of; done
measure neutral $locked $few,word-scores
measure relevance $locked $few,best-of
measure brevity --rollouts runs/long --max-tokens 96 $locked $few,end-token
measure nontoxic --rollouts runs/rtp --tuning-prompts runs/rtp.jsonl --formats text --max-tokens 32 $locked $few
if [ -f "$SHP" ]; then
    shp="--prompts $SHP --split all --max-prompts 32 --num-samples 2 --tuning-prompts $own"
    for head in positive plain neutral relevance; do measure $head $shp $few; done
    measure brevity --rollouts runs/long --max-tokens 96 $shp $few,end-token
fi

"$python" -m benchmarks.quality.report --into docs/quality.md
"$python" -m benchmarks.quality.report --into value_models/pretrained/SmolLM2-135M-Instruct/README.md
"$python" -m benchmarks.quality.report --heads-dir value_models/pretrained/gemma-3-270m --into value_models/pretrained/gemma-3-270m/README.md
