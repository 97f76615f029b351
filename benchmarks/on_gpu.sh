#!/usr/bin/env bash
# on_gpu.sh -- trains the public bases for colour and every private adapter that starts from them, on one GPU,
# and measures what they draw, without anybody watching.
#
# Each piece is finished and saved before the next one begins. A piece whose result exists is left out, and
# one that was interrupted goes on from its checkpoint, so after any stop the same command continues. A piece
# that fails is reported at the end, and the pieces that do not need it still run. On a GPU the whole script
# has not been run yet.
#
#   $ pip install -r requirements.txt -r requirements-peers.txt
#   $ PHOTOS=folder:photos CIFAR10=npz:cifar10.npz FACES=npz:faces.npz INCEPTION=default_1.pt \
#         bash benchmarks/on_gpu.sh runs/gpu
#
# PHOTOS is a folder of public photographs with a sub-folder for each class, among them the ten classes that
# CIFAR-10 starts from (`start` below). CIFAR10 and FACES are .npz files (or folders) of 50,000 and 23,233
# images, and INCEPTION is the file of the FID network (see evaluate.py).
#
# With DIVIDE=100 the numbers of steps, samples and epochs and the batches of public training are divided by
# 100, and the results go to runs/gpu-100: a dry run of every line but the tests and the table of speed, which
# a CPU can do (TORCH_COMPILE_DISABLE=1 saves the compiler). The results of the private runs are then far from
# good, but their epsilon is right.
set -uo pipefail
trap 'exit 130' INT TERM                     # a piece that is stopped saves its state; the next must not begin
cd "$(dirname "$0")/.."
: "${PHOTOS:?}" "${CIFAR10:?}" "${FACES:?}" "${INCEPTION:?}"
start="projectile,sports car,goose,tabby,gazelle,golden retriever,bullfrog,ox,lifeboat,moving van"
IFS=, read -ra classes <<<"$start"
for class in "${classes[@]}"; do             # before hours are spent, not after
    [ -d "${PHOTOS#folder:}/$class" ] || { echo "PHOTOS=$PHOTOS has no sub-folder '$class'"; exit 2; }
done
[ -f "$INCEPTION" ] || { echo "INCEPTION=$INCEPTION is no file"; exit 2; }
out=${1:-runs/gpu} divide=${DIVIDE:-1} failed=()
[ "$divide" = 1 ] || out=$out-$divide
mkdir -p "$out"

n() { echo $(($1 / divide > ${2:-1} ? $1 / divide : ${2:-1})); }      # n NUMBER [LEAST]: NUMBER / DIVIDE

piece() {                                    # piece RESULT COMMAND...: run it, unless RESULT exists
    local result=$out/$1
    [ -e "$result" ] && [ ! -e "$(dirname "$result")/checkpoint.pt" ] && return
    echo "--- $1, $(date +%T): ${*:2}"
    "${@:2}" >>"$out/${1//\//-}.log" 2>&1 || { failed+=("$1"); tail -n 1 "$out/${1//\//-}.log"; }
}
public() {                                   # public FILE ARGUMENTS...: a training on public images
    local more=()
    [ -e "$out/$1.checkpoint" ] && more=(--resume)
    piece "$1" python pretrain.py "${@:2}" --out "$out/$1" "${more[@]}"
}
private() {                                  # private NAME DATA ARGUMENTS...: a private run
    local more=()
    [ -e "$out/$1/checkpoint.pt" ] && more=(--resume)
    piece "$1/privacy.json" python train.py --data "$2" --accountant pld --chunk "$(n 1152 64)" \
        --out "$out/$1" "${@:3}" "${more[@]}"
}
figures() {                                  # figures NAME DATA SAMPLES ARGUMENTS...: samples, measured
    piece "$1.npz" python sample.py "$out/$1" --n "$(n "$3" 20)" --npz "$out/$1.npz" "${@:4}"
    piece "$1-evaluation.json" python evaluate.py "$out/$1.npz" --data "$2" --epochs "$(n 50)" \
        --no-anchors --references "$(n 10000 20)" --inception "$INCEPTION"
}

# 1. does it work here, and what does a private step cost?
if [ "$divide" = 1 ]; then
    piece tests.txt bash -c 'python -m pytest -q && touch "$0"' "$out/tests.txt"                # see the .log
    piece speed.txt bash -c 'python benchmarks/speed.py --train && touch "$0"' "$out/speed.txt"
fi

# 2. public: an autoencoder with 8 numbers at each position, a large base for photographs, and what is drawn
public autoencoder.pt autoencoder --channels 8 --data "$PHOTOS" --batch "$(n 128 4)" --lr 2e-3 \
    --steps "$(n 12000)"
public photos.pt --unet photos-large --autoencoder "$out/autoencoder.pt" --data "$PHOTOS" --flip --compile \
    --batch "$(n 1024 8)" --lr 1e-3 --steps "$(n 24000)"
for drawn in smears faces; do
    public $drawn.pt --data $drawn --base "$out/photos.pt" --compile --batch "$(n 1024 8)" --lr 1e-3 \
        --steps "$(n 1500)"
done

# 3. private: one recipe for each budget, near those of docs/recipes.md
cifar=(--N 50000 --size 32 --classes airplane,automobile,bird,cat,deer,dog,frog,horse,ship,truck
       --start "$start" --base "$out/photos.pt" --draws paper)
faces=(--N 23233 --size 64 --classes face --base "$out/faces.pt" --draws paper)
cells=(--base "$out/smears.pt" --draws paper)
at_10=(--epsilon 10 --train lora+conv --lr 1e-2 --B 1024 --steps "$(n 250)")
at_1=(--epsilon 1 --lr 6e-3 --B 2048 --steps "$(n 100)")
wide=(--train lora+conv --lr 1e-2)           # on faces it is better at epsilon = 1, too
for budget in 10 1; do
    declare -n how=at_$budget
    guidance=0; [ $budget = 10 ] && guidance=0.5
    private cells-eps$budget cells "${cells[@]}" "${how[@]}"
    figures cells-eps$budget cells 10000 --guidance $guidance
    private faces-eps$budget "$FACES" "${faces[@]}" "${how[@]}" "${wide[@]}"
    figures faces-eps$budget "$FACES" 10000 --sampler ddim --guidance 0
    private cifar10-eps$budget "$CIFAR10" "${cifar[@]}" "${how[@]}"
    figures cifar10-eps$budget "$CIFAR10" 20000 --guidance $guidance
done

[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}; see the .log files in $out"; exit 1; }
echo "all pieces are in $out"
