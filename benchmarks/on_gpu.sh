#!/usr/bin/env bash
# on_gpu.sh -- trains the public bases for colour and every private adapter that starts from them, on one GPU,
# and measures what they draw, without anybody watching.
#
# Each piece is finished and saved before the next one begins. A piece whose result exists is left out, and
# one that was interrupted goes on from its checkpoint, so after any stop the same command continues. A piece
# that fails is reported at the end, and the pieces that do not need it still run. PHOTOS, CIFAR10 and FACES
# name the images as `--data` takes them; INCEPTION is the file of the FID network (see evaluate.py). On a GPU
# the whole script has not been run yet.
#
#   $ PHOTOS=folder:photos CIFAR10=npz:cifar10.npz FACES=npz:faces.npz INCEPTION=default_1.pt \
#         bash benchmarks/on_gpu.sh runs/gpu
#
# With DIVIDE=100 every number of steps, images and epochs is divided by 100: a dry run of every line, which a
# CPU can do. The results of the private runs are then far from good, but their epsilon is right.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${PHOTOS:?}" "${CIFAR10:?}" "${FACES:?}" "${INCEPTION:?}"
out=${1:-runs/gpu} divide=${DIVIDE:-1} failed=()
mkdir -p "$out"

n() { echo $(($1 / divide > ${2:-1} ? $1 / divide : ${2:-1})); }      # n NUMBER [LEAST]: NUMBER / DIVIDE

piece() {                                    # piece RESULT COMMAND...: run it, unless RESULT exists
    local result=$out/$1
    [ -e "$result" ] && return
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
    piece "$1/privacy.json" python train.py --data "$2" --accountant pld --chunk "$(n 1024 64)" \
        --out "$out/$1" "${@:3}" "${more[@]}"
}
figures() {                                  # figures NAME DATA SAMPLES ARGUMENTS...: samples, measured
    piece "$1.npz" python sample.py "$out/$1" --n "$(n "$3" 20)" --npz "$out/$1.npz" "${@:4}"
    piece "$1-evaluation.json" python evaluate.py "$out/$1.npz" --data "$2" --epochs "$(n 50)" \
        --no-anchors --references "$(n 10000 20)" --inception "$INCEPTION"
}

# 1. does it work here, and what does a private step cost?
if [ "$divide" = 1 ]; then
    piece tests.txt bash -c "python -m pytest -q >$out/part && mv $out/part $out/tests.txt"
    piece speed.txt bash -c "python benchmarks/speed.py --train >$out/part && mv $out/part $out/speed.txt"
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
       --start "projectile,sports car,goose,tabby,gazelle,golden retriever,bullfrog,ox,lifeboat,moving van"
       --base "$out/photos.pt" --draws paper)
faces=(--N 23233 --size 64 --classes face --base "$out/faces.pt" --draws paper)
cells=(--base "$out/smears.pt" --draws paper)
at_10=(--epsilon 10 --train lora+conv --lr 1e-2 --B 1024 --steps "$(n 250)")
at_1=(--epsilon 1 --lr 6e-3 --B 2048 --steps "$(n 100)")
for budget in 10 1; do
    declare -n how=at_$budget
    private cells-eps$budget cells "${cells[@]}" "${how[@]}"
    figures cells-eps$budget cells 10000 --guidance 0.5
    private faces-eps$budget "$FACES" "${faces[@]}" "${how[@]}"
    figures faces-eps$budget "$FACES" 10000 --sampler ddim --guidance 0
    private cifar10-eps$budget "$CIFAR10" "${cifar[@]}" "${how[@]}"
    figures cifar10-eps$budget "$CIFAR10" 20000 --guidance 0.5
done

[ ${#failed[@]} = 0 ] || { echo "failed: ${failed[*]}; see the .log files in $out"; exit 1; }
echo "all pieces are in $out"
