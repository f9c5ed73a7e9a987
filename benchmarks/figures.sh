#!/bin/sh
# Every figure of the pages anew, from nothing, in a night on two cores that do nothing else. Run by `make figures` from
# the project's root, after `make peers`. Each part is done once: one that was stopped is begun again, or goes on, when
# the command is repeated, and `rm -r runs/figures` forgets what was done. Figures of a GPU are `benchmarks/gpu.sh`'s.
set -eu
python="$1"
results=benchmarks/results
mkdir -p runs/figures

once() { # name of the part, module, flags
    part="$1" && shift
    [ ! -e "runs/figures/$part" ] || return 0
    echo "figures: $part"
    "$python" -m "$@"
    touch "runs/figures/$part"
}

sh benchmarks/quality/make_heads.sh "$python"
once judges benchmarks.judges --out $results/judges.json --into docs/quality.md
once guidance benchmarks.guidance --num-prompts 24 --num-samples 1 --out $results/guidance.json --into docs/quality.md
once roads benchmarks.roads positive --num-samples 2 --max-prompts 40 --out $results/roads.json --into docs/heads.md
once guard benchmarks.guard --num-prompts 60 --num-samples 2 --max-tokens 48 --out $results/guard.json --into docs/control.md
once dialogues benchmarks.dialogues --seed 1 --out $results/dialogues.json --into docs/control.md
once reward-search benchmarks.reward_search afinn,positive --out $results/reward-search.json --into docs/control.md
once pinned benchmarks.pinned --out $results/pinned.json --into docs/control.md
once critic benchmarks.critic positive,plain,neutral,brevity,relevance --out $results/critic.json --into docs/tried.md
for reward in plain positive neutral; do
    once "critic-sampling-$reward" benchmarks.critic_sampling $reward --out $results/critic-sampling.json --into docs/tried.md
done
once fields benchmarks.fields brevity --rollouts runs/rollouts --out $results/fields.json --into docs/tried.md
once reward-levels benchmarks.reward_levels positive,plain --out $results/reward-levels.json --into docs/control.md
once tool-calls benchmarks.tool_calls --out $results/tool-calls.json --into docs/http-api.md
once training-memory benchmarks.training_memory --tokens 300000,5000000 --hidden-size 4096 --out $results/training-memory.json \
    --into docs/heads.md
once edit-launches benchmarks.edit --rows 256 --out $results/edit-launches.json --into docs/performance.md
once soak tests.soak --num-requests 10000 --out $results/cpu-soak.json --into docs/operation.md

once field-speed benchmarks.speed --only offline --peers recontrol,recontrol-1-head --heads brevity --batch-sizes 1,8,32 \
    --repeats 5 --label field --out $results/field-speed.json --into docs/performance.md

# A table for each kind of processor; one of another kind is measured and written into no page.
heads='--heads positive,plain,neutral'
peers=recontrol,recontrol-1-head,recontrol-4bit,vllm,transformers,llama-cpp,llama-cpp-4bit
vllm_arms=vllm,vllm-again,vllm-control,vllm-control-1-head,vllm-control-3-heads
into='--into docs/performance.md'
if grep -qw amx_tile /proc/cpuinfo; then
    once amx benchmarks.speed --only offline --peers $peers --batch-sizes 1,8,32,64 --repeats 2 --heads positive \
        --label amx --out $results/amx.json $into
    once amx-long benchmarks.speed --only long,neighbours --peers recontrol,vllm,transformers --repeats 2 \
        --heads positive --label amx --out $results/amx-long.json $into
elif grep -qw avx2 /proc/cpuinfo && ! grep -qw avx512f /proc/cpuinfo; then
    once avx2 benchmarks.speed --only offline --peers recontrol,recontrol-1-head,recontrol-4bit,vllm \
        --batch-sizes 1,8,32,64 --repeats 2 --heads positive --label avx2 --out $results/avx2.json $into
else
    grep -qw avx512_bf16 /proc/cpuinfo || { into='' && results=runs/figures; }
    once cpu benchmarks.speed --repeats 4 --rates 2,4 --num-requests 30 $heads --out $results/cpu.json $into
    once cpu-vllm benchmarks.speed --only offline --peers $vllm_arms --batch-sizes 32 --repeats 9 $heads \
        --out $results/cpu-vllm.json $into
fi
"$python" -m benchmarks.readme
