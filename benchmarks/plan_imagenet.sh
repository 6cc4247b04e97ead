#!/bin/sh
# What all of ImageNet takes on H100s, by plan; none of it is at hand. First as the preset has it, in full width, then
# ten ResNet50s whose probes are reduced: the input, the first fifteen of sixteen blocks, and the softmax, 17 a member.
# The audit, which is most of it, once more on a tenth of the points.
# python benchmarks/record.py plan-imagenet -- sh benchmarks/plan_imagenet.sh
points="--points 1281167+50000 --classes 1000 --gpu h100"
members='members=[{architecture: resnet50, count: 10, weights: "resnet50-{seed}.safetensors", split: {kind: part},
  probes: ["layer[123].*", "layer4.[01]"]}]'
reduction='reduction={input: "jl:1024", "layer*.*": "jl:1024"}'

plan() {
    echo "\$ leadline plan $*"
    leadline plan "$@"
    echo "exit code $?"
    echo
}

plan imagenet $points --nodes 8
for cluster in "--nodes 1 --gpus-per-node 1" "--nodes 1" "--nodes 8"; do
    plan imagenet $points $cluster --set "$members" --set "$reduction"
done
for cluster in "--nodes 1 --gpus-per-node 1" "--nodes 1" "--nodes 8"; do
    plan imagenet $points $cluster --set "$members" --set "$reduction" \
        --set engine.placement=shared --set engine.memory_budget=20000000000 --set audit.sample=100
done
