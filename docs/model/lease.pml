/*
 * The protocol of leases, as a model that SPIN checks to exhaustion.
 *
 * One Lua script is one atomic step of the store; each is an inline here, named after its file. Between
 * two steps anything may happen: a worker is killed or sleeps, a call arrives late or its reply never, a
 * reaper judges. docs/model/README.md says what is left out, and why, and what the check costs.
 *
 *   what is held       exec[r] (job hash), holder[r], lease[r], and the holder's index HELD(i, r): the
 *                      same fact four times, written together. Who may write is decided by exec[r] alone.
 *   what waits         queue[r] (RQ's list) or retry[r] (our set of due times)
 *   what has ended     status[r], with last_e[r], the execution that ended
 *   where to go on     have[r] outputs, in epoch[r]; a checkpoint is written with them, in one step
 *   who is dead        beat[i] (the incarnation has a score among the heartbeats), reaped[i] (tombstone)
 *
 * Clocks are not modelled: a lease or heartbeat of somebody who is gone has run out whenever a reaper
 * looks, and that of a living worker runs out at any moment, at the price of one fault (it was stopped,
 * swapped out or cut off). A worker that "sleeps" is one that takes no step for a while; a zombie is one
 * that goes on afterwards. A step of the server's clock is an outage (`calm`): nobody may be judged by clocks then.
 * Every combination of at most FAULTS faults is looked at.
 *
 * With REUSE, RQ's Job.delete may delete request 0 at any time, unknown to our scripts (a key that expires is the
 * same to them). Its id may be submitted again, and RQ may enqueue it again while it runs or after its end.
 */

#define WORKERS  2
#define REQUESTS 2
#define REAPERS  2
#ifndef OUTPUTS
#define OUTPUTS  2              /* of a request: the first goes with a checkpoint, the last with the finish */
#endif

#ifndef FAULTS
#define FAULTS   3
#endif
#ifdef ROLLBACK
#define LIVES    (FAULTS + 1)   /* an older store knows older incarnations: none is forgotten */
#else
#define LIVES    2              /* incarnations of one worker that the store knows at a time */
#endif
#define INCARNATIONS (WORKERS * LIVES)

/* protocol/states.py. `stopped` is `canceled` with another word, and is not told apart here. */
#define CREATED   0
#define QUEUED    1
#define SCHEDULED 2
#define STARTED   3
#define FINISHED  4
#define FAILED    5
#define CANCELED  6
#define ENDED(r)  (status[r] >= FINISHED)

/* What scripts answer. */
#define OK        0
#define LOST      1
#define CANCEL    2
#define DEADLINE  3
#define GAP       4
#define ALREADY   5
#define REAPED    6

/* --- the store ------------------------------------------------------------------------------------ */

byte status[REQUESTS];
byte exec[REQUESTS];            /* 0: none; ids of executions are unique within a request */
byte holder[REQUESTS];
byte last_e[REQUESTS];
byte have[REQUESTS];
byte epoch[REQUESTS];
bit  queue[REQUESTS];
bit  retry[REQUESTS];
bit  lease[REQUESTS];
bit  cancel_wish[REQUESTS];
bit  overdue[REQUESTS];         /* its deadline has passed */
byte held[INCARNATIONS * REQUESTS];
bit  beat[INCARNATIONS];
bit  reaped[INCARNATIONS];
byte ends[REQUESTS];            /* ghost: how often it has ended */
#define HELD(i, r) held[(i) * REQUESTS + (r)]

#ifdef REUSE
/* RQ's Job.delete, a submit under a deleted id, and RQ's enqueue_job, of request 0. */
bit  again[REQUESTS];           /* enqueued_again(): its date of enqueueing is newer than its last claim */
bit  owed[REQUESTS];            /* ghost: somebody enqueued it again and it has not begun since */
bit  deleted;                   /* and not submitted again */
bit  over;                      /* nor will it be */
#define AGAIN(r)   again[r]
#else
#define AGAIN(r)   false
#endif
/* lib/lease/runs.lua: the one source of whether a request runs. */
#define RUNS(r)    (exec[r] != 0 && HELD(holder[r], r) == exec[r])
/* Enqueued again while it runs: its entry waits for the end of that run. */
#define LATER(r)   (AGAIN(r) && RUNS(r))

byte issued[REQUESTS];          /* ghost: executions made so far; `fresh` ids are new ones, whatever the store forgets */
bit  calm = 1;                  /* the pulse is older than one heartbeat timeout */
byte faults;

/* --- the workers: what each believes ---------------------------------------------------------------- */

bit  alive[WORKERS];
byte life[WORKERS];
byte mine[WORKERS * REQUESTS];  /* the execution that it holds, 0 for none */
byte at[WORKERS * REQUESTS];    /* outputs confirmed; STOPPING once it was told of a cancel */
byte seen[WORKERS * REQUESTS];  /* the epoch in which they count */
#define MINE(w, r) mine[(w) * REQUESTS + (r)]
#define AT(w, r)   at[(w) * REQUESTS + (r)]
#define SEEN(w, r) seen[(w) * REQUESTS + (r)]
#define STOPPING   (OUTPUTS + 1)
#define ME(w)      ((w) * LIVES + life[w])
#define OWNER(i)   ((i) / LIVES)
/* No process goes by this incarnation any more. */
#define GONE(i)    (!alive[OWNER(i)] || life[OWNER(i)] != (i) % LIVES)

/* --- the wire: one call whose sender gave it up, and which arrives whenever it does ------------------ */

#define NOTHING  0
#define CLAIM    1
#define PROGRESS 2
#define FINISH   3
#define FAIL     4
#define RELEASE  5
#define CONFIRM  6
byte wire, wire_i, wire_r, wire_e, wire_at, wire_seen;
bit  wire_known[REQUESTS];

hidden byte answer, n, k, m;    /* of the step under way */
hidden byte given[REQUESTS], known[REQUESTS], some;

/* A fault is taken from the bound that all share. */
#define FAULT    faults < FAULTS -> faults++

/* --- the promises ------------------------------------------------------------------------------------ */

/* A write is accepted from the execution that holds the request, and in the epoch that its outputs have. */
#define ONE_WRITER(r, e)  assert(exec[r] == e)
#define ONE_EPOCH(r, p)   assert(epoch[r] == p)
#define NO_GAP(r, o)      assert(have[r] == o)
#define ENDS_ONCE(r)      assert(ends[r] == 1)
/* Only the dead, and who was silent for a heartbeat timeout, lose what they hold. */
#define NEEDED(i)         assert(GONE(i))

/* One fact, four times; and what is neither held nor ended waits in one place. */
#define WHOLE(r) assert( \
    (exec[r] != 0) == (status[r] == STARTED) && SAME(exec[r] != 0, lease[r]) \
    && (exec[r] == 0 || HELD(holder[r], r) == exec[r]) \
    && (status[r] != QUEUED || queue[r]) && SAME(status[r] == SCHEDULED, retry[r]) \
    && (status[r] != STARTED || !queue[r] || AGAIN(r) || TAKEN_BACK(r)))
#ifdef REUSE
/* Of a deleted id, a lease or a place aside may stand for a while. */
#define SAME(a, b) (!(a) || (b))
/* It was enqueued again and then canceled, with the run that goes on: a claim drops the entry. */
#define TAKEN_BACK(r) cancel_wish[r]
#else
#define TAKEN_BACK(r) false
#define SAME(a, b) ((a) == (b))
#endif

/* A move of protocol/states.py by the named scripts; tests/protocol/model/test_spin.py compares them with that table. */
#define MOVE(scripts, from, to) assert(status[r] == from); status[r] = to

/* --- lib/… ---------------------------------------------------------------------------------------- */

inline detach(r, e, i) {
    assert(HELD(i, r) == e);    /* the script looks before it deletes */
    HELD(i, r) = 0;
    lease[r] = 0;
    exec[r] = 0;
    holder[r] = 0;
    last_e[r] = e
}

/* finish.lua, bury, cancel.lua: the end. */
inline ended(r) {
    ends[r]++;
    ENDS_ONCE(r);
    retry[r] = 0;
    cancel_wish[r] = 0;
    overdue[r] = 0
}

/* lib/ending/end_waiting.lua: this coming into the queue is over, as after a claim. */
inline ended_waiting(r) {
#ifdef REUSE
    again[r] = 0;
    owed[r] = 0;
#endif
    ended(r)
}

inline to_front(r) {
    assert(!queue[r] || AGAIN(r));
    queue[r] = 1
}

inline to_retries(r) {
    assert(SAME(queue[r], AGAIN(r)) && SAME(retry[r], false));
    retry[r] = 1
}

inline restart(r) {
    have[r] = 0;
    epoch[r]++
}

/* Append one output at an absolute offset. */
inline store(r, e, o, p) {
    if
#ifdef BROKEN_GAP
    :: o > have[r] -> NO_GAP(r, o)
#else
    :: o > have[r] -> answer = GAP      /* only a store that went back has less than it had confirmed */
#endif
    :: o < have[r]                      /* it is there: the second sending of a call */
    :: o == have[r] ->
        ONE_WRITER(r, e);
        ONE_EPOCH(r, p);
        have[r] = o + 1
    fi
}

/* An execution that is not the current one; its holder's index lost it too, unless its job was deleted. */
inline fenced(r, e, i) {
#ifdef REUSE
    void(r, e, i);
#else
    assert(HELD(i, r) != e);
#endif
    answer = LOST
}

#ifdef REUSE
/* What is left of an execution whose job was deleted: without a successor, the lease too. */
inline void(r, e, i) {
    if
    :: HELD(i, r) == e ->
        HELD(i, r) = 0;
        if
#ifdef BROKEN_VOID
        :: lease[r] = 0
#else
        :: status[r] == CREATED -> lease[r] = 0
        :: else
#endif
        fi
    :: else
    fi
}
#endif

/* fail.lua, reap.lua. The counts that choose between a retry and a dead letter are left out: either may come. */
inline decide(r, e, i) {
    detach(r, e, i);
    if
    :: cancel_wish[r] -> MOVE("fail reap", STARTED, CANCELED); ended(r)
    :: !cancel_wish[r] -> MOVE("fail reap", STARTED, QUEUED); to_front(r)
    :: !cancel_wish[r] -> MOVE("fail reap", STARTED, SCHEDULED); to_retries(r)
    :: !cancel_wish[r] -> MOVE("fail reap", STARTED, FAILED); ended(r)
    fi;
    WHOLE(r)
}

/* progress.lua, renew.lua: a deadline is met by the request's own writes. */
inline end_running(r, e, i) {
    if
    :: overdue[r] ->
        detach(r, e, i);
        MOVE("progress renew", STARTED, FAILED);
        ended(r);
        answer = DEADLINE
    :: else
    fi
}

/* promote.lua, claim.lua. */
inline promote_one(r) {
    assert(retry[r]);
    retry[r] = 0;
    MOVE("promote claim", SCHEDULED, QUEUED);
    queue[r] = 1
}

/* --- enqueue.lua --------------------------------------------------------------------------------------- */

inline enqueue(r) {
    if
    :: status[r] == CREATED ->
        MOVE("enqueue", CREATED, QUEUED);
        queue[r] = 1;
        have[r] = 0;                    /* what an earlier use of the id has written */
        epoch[r] = 0
    :: status[r] == CREATED ->
        MOVE("enqueue", CREATED, SCHEDULED);
        retry[r] = 1;
        have[r] = 0;
        epoch[r] = 0
    :: else -> answer = ALREADY         /* the same submit, sent again */
    fi;
    WHOLE(r)
}

/* --- claim.lua ------------------------------------------------------------------------------------------ */

#ifdef REUSE
/* A claim meets one that has ended, and was enqueued again: everything starts anew. */
inline begin_anew(r) {
    if
#ifndef BROKEN_AGAIN
    :: ENDED(r) && again[r] ->
        live_again(r);
        restart(r)
#endif
    :: else
    fi;
    if
    :: !RUNS(r) -> again[r] = 0
    :: else
    fi
}

/* RQ has written `queued`; the end before is history. */
inline live_again(r) {
    status[r] = QUEUED;
    ends[r] = 0
}

/* RQ's Job.delete: the hash goes, and one entry in the list; there may be another one. What is ours stays. */
inline delete(r) {
    deleted = 1;
    status[r] = CREATED;
    exec[r] = 0;
    holder[r] = 0;
    last_e[r] = 0;
    cancel_wish[r] = 0;
    overdue[r] = 0;
    again[r] = 0;
    owed[r] = 0;
    ends[r] = 0;
    if
    :: queue[r] = 0
    :: queue[r]
    fi
}

/* RQ's enqueue_job, of what runs or has ended. */
inline enqueue_again(r) {
    queue[r] = 1;
    again[r] = 1;
    owed[r] = 1
}
#endif

/* given[r] says what the reply holds; known[r] what the caller said that it knows. */
inline take(r, i) {
    queue[r] = 0;
#ifdef REUSE
    begin_anew(r);
#endif
    if
    :: ENDED(r)                         /* canceled or too late while it waited: it only leaves the list */
#ifdef REUSE
    :: status[r] == CREATED             /* deleted; RQ has left the entry */
    :: RUNS(r)                          /* its entry stood there twice */
#ifdef BROKEN_RUNS
    :: status[r] == QUEUED && lease[r]  /* "it runs already" */
#endif
#endif
    :: status[r] == QUEUED && overdue[r] -> MOVE("claim", QUEUED, FAILED); ended_waiting(r)
    :: else ->
        assert(exec[r] == 0);
        MOVE("claim", QUEUED, STARTED);
        issued[r]++;
        exec[r] = issued[r];
        holder[r] = i;
        HELD(i, r) = exec[r];
        lease[r] = 1;
        beat[i] = 1;
#ifdef REUSE
        owed[r] = 0;
#endif
        given[r] = 1
    fi;
    WHOLE(r)
}

#define WAITS(r) ((queue[r] && !LATER(r)) || retry[r])

inline claim(i) {
    answer = OK;
    if
    :: reaped[i] -> answer = REAPED
    :: else ->
        some = 0;
#ifndef BROKEN_CLAIM
        /* What was given in a reply that got lost is given again, with the execution that it has. */
        n = 0;
        do
#ifdef REUSE
        :: n < REQUESTS && HELD(i, n) != 0 && !known[n] && exec[n] != HELD(i, n) -> k = HELD(i, n); void(n, k, i); n++
        :: n < REQUESTS && HELD(i, n) != 0 && !known[n] && exec[n] == HELD(i, n) ->
#else
        :: n < REQUESTS && HELD(i, n) != 0 && !known[n] ->
#endif
            assert(exec[n] == HELD(i, n) && lease[n]);
            given[n] = 1;
            some = 1;
            n++
        :: n < REQUESTS && (HELD(i, n) == 0 || known[n]) -> n++
        :: n == REQUESTS -> break
        od;
#endif
        if
        :: some
        :: else ->
            /* One at least, in any order; with more free slots, the other one too. */
            if
            :: WAITS(0) -> m = 0
            :: WAITS(1) -> m = 1
            :: else -> m = REQUESTS
            fi;
            do
            :: m < REQUESTS ->
                if
                :: retry[m] && status[m] == SCHEDULED -> promote_one(m)
#ifdef REUSE
                :: retry[m] && status[m] != SCHEDULED -> retry[m] = 0
#endif
                :: else
                fi;
                if
                :: queue[m] && !LATER(m) -> take(m, i)
                :: else
                fi;
                m = (some -> REQUESTS : 1 - m);
                some = 1
            :: m < REQUESTS && some -> m = REQUESTS
            :: m == REQUESTS -> break
            od
        fi
    fi
}

/* --- progress.lua, renew.lua, finish.lua, fail.lua, release.lua, cancel.lua --------------------------------- */

inline progress(r, e, i, o, p) {
    answer = OK;
    if
#ifndef BROKEN_PROGRESS
    :: exec[r] != e -> fenced(r, e, i)
#endif
    :: else ->
        if
        :: cancel_wish[r] -> answer = CANCEL
        :: else ->
            store(r, e, o, p);
            if
            :: answer == OK -> end_running(r, e, i)
            :: else
            fi
        fi
    fi;
    WHOLE(r)
}

inline renew(r, e, i) {
    answer = OK;
    if
    :: exec[r] != e -> fenced(r, e, i)
    :: else ->
        if
        :: cancel_wish[r] -> answer = CANCEL
        :: else -> end_running(r, e, i)
        fi
    fi
}

/* A finish wins over a cancel that the worker has not acted upon, and over a deadline. */
inline finish(r, e, i, o, p) {
    answer = OK;
    if
#ifndef BROKEN_FINISH
    :: exec[r] != e ->
        if
        :: last_e[r] == e && status[r] == FINISHED -> answer = ALREADY
        :: else -> fenced(r, e, i)
        fi
#endif
    :: else ->
        store(r, e, o, p);
        if
        :: answer == OK ->
            ONE_WRITER(r, e);
            detach(r, e, i);
            MOVE("finish", STARTED, FINISHED);
            ended(r)
        :: else
        fi
    fi;
    WHOLE(r)
}

inline fail(r, e, i) {
    answer = OK;
    if
    :: exec[r] != e ->
        if
        :: last_e[r] == e -> answer = ALREADY
        :: else -> fenced(r, e, i)
        fi
    :: else -> decide(r, e, i)
    fi
}

inline release(r, e, i) {
    answer = OK;
    if
    :: exec[r] != e ->
        if
        :: last_e[r] == e -> answer = ALREADY
        :: else -> fenced(r, e, i)
        fi
    :: else ->
        detach(r, e, i);
        if
        :: cancel_wish[r] -> MOVE("release", STARTED, CANCELED); ended(r)
        :: !cancel_wish[r] -> MOVE("release", STARTED, QUEUED); to_front(r)
        :: !cancel_wish[r] -> MOVE("release", STARTED, SCHEDULED); to_retries(r)
        :: !cancel_wish[r] -> MOVE("release", STARTED, FAILED); ended(r)
        fi
    fi;
    WHOLE(r)
}

/* Its worker acts upon the wish. */
inline cancel_running(r, e, i) {
    answer = OK;
    if
    :: exec[r] != e ->
        if
        :: last_e[r] == e && status[r] == CANCELED -> answer = CANCEL
        :: else -> fenced(r, e, i)
        fi
    :: else ->
        detach(r, e, i);
        MOVE("cancel", STARTED, CANCELED);
        ended(r)
    fi;
    WHOLE(r)
}

/* Anybody else asks. The id stays in the list; the claim that pops it drops it. */
inline cancel(r) {
    if
    :: exec[r] != 0 ->
        cancel_wish[r] = 1;
#ifdef REUSE
        again[r] = 0;                   /* that it is to run once more is canceled too */
        owed[r] = 0
#endif
    :: exec[r] == 0 && status[r] == QUEUED -> MOVE("cancel", QUEUED, CANCELED); ended_waiting(r)
    :: exec[r] == 0 && status[r] == SCHEDULED -> MOVE("cancel", SCHEDULED, CANCELED); ended_waiting(r)
#ifdef REUSE
    :: ENDED(r) && again[r] ->          /* it waits to run again */
        live_again(r);
        MOVE("cancel", QUEUED, CANCELED);
        ended_waiting(r)
#endif
    fi;
    WHOLE(r)
}

/* --- reap.lua, promote.lua, expire.lua ------------------------------------------------------------------------ */

/* One call with a limit of one request: what is left is for the next call, of whichever reaper. */
inline reap_incarnation(i) {
    reaped[i] = 1;
    if
    :: HELD(i, 1) != 0 -> k = HELD(i, 1); decide(1, k, i)
    :: HELD(i, 1) == 0 && HELD(i, 0) != 0 && exec[0] == HELD(i, 0) -> k = HELD(i, 0); decide(0, k, i)
#ifdef REUSE
    :: HELD(i, 1) == 0 && HELD(i, 0) != 0 && exec[0] != HELD(i, 0) -> k = HELD(i, 0); void(0, k, i)
#endif
    :: else
    fi;
    if
    :: HELD(i, 0) == 0 && HELD(i, 1) == 0 -> beat[i] = 0
    :: else                             /* left */
    fi
}

/* A sweep meets an expired lease: the incarnation goes on, the request does not. */
inline reap_lease(r) {
    k = exec[r];
    m = holder[r];
    decide(r, k, m)
}

inline promote(r) {
    if
    :: overdue[r] && exec[r] == 0 && status[r] == QUEUED -> MOVE("promote", QUEUED, FAILED); ended_waiting(r)
    :: overdue[r] && exec[r] == 0 && status[r] == SCHEDULED -> MOVE("promote", SCHEDULED, FAILED); ended_waiting(r)
    :: !overdue[r] && retry[r] && status[r] == SCHEDULED -> promote_one(r)
#ifdef REUSE
    :: retry[r] && status[r] != SCHEDULED -> retry[r] = 0
#endif
    fi;
    WHOLE(r)
}

/* --- a worker: workers/redis_io/line.py, endings.py, claimer.py, holding.py ------------------------------------------ */

inline let_go(w, r) {
    MINE(w, r) = 0;
    AT(w, r) = 0;
    SEEN(w, r) = 0
}

inline drop_all(w) {
    let_go(w, 0);
    let_go(w, 1)
}

/* What a reply gives: the checkpoint's offset and the epoch. */
inline receive(w) {
    n = 0;
    do
    :: n < REQUESTS && given[n] ->
        MINE(w, n) = exec[n];
        AT(w, n) = have[n];
        SEEN(w, n) = epoch[n];
        given[n] = 0;
        n++
    :: n < REQUESTS && !given[n] -> n++
    :: n == REQUESTS -> break
    od
}

/* A slot of the model for a new incarnation: one of which the store holds nothing and no call is under way. */
#ifdef ROLLBACK
#define FREE_LIFE(w) (life[w] + 1 < LIVES)
#define NEXT_LIFE(w) (life[w] + 1)
#else
#define NEXT_LIFE(w) (1 - life[w])
#define OTHER(w)     ((w) * LIVES + NEXT_LIFE(w))
#define FREE_LIFE(w) (HELD(OTHER(w), 0) == 0 && HELD(OTHER(w), 1) == 0 && !(wire != NOTHING && wire_i == OTHER(w)))
#endif

inline new_incarnation(w) {
    life[w] = NEXT_LIFE(w);
    beat[ME(w)] = 0;
    reaped[ME(w)] = 0;
    alive[w] = 1
}

/* A call that its sender gives up: it may have been applied, or may be, at any time or never. */
inline post(op, w, r) {
    wire = op;
    wire_i = ME(w);
    wire_r = r;
    if
    :: op != CLAIM -> wire_e = MINE(w, r)
    :: else -> wire_known[0] = MINE(w, 0) != 0; wire_known[1] = MINE(w, 1) != 0
    fi;
    if
    :: op == PROGRESS || op == FINISH -> wire_at = AT(w, r); wire_seen = SEEN(w, r)
    :: else
    fi
}

inline hear(w, r) {
    if
    :: answer == CANCEL -> AT(w, r) = STOPPING
    :: answer == GAP -> k = MINE(w, r); release(r, k, ME(w)); let_go(w, r)
    :: answer == LOST || answer == DEADLINE || answer == ALREADY -> let_go(w, r)
    :: answer == OK
    fi
}

#ifdef BROKEN_CLAIM
#define UNKNOWN(w, r) false
#else
#define UNKNOWN(w, r) (HELD(ME(w), r) != 0 && MINE(w, r) == 0)
#endif
/* A claim that would change nothing is left out: with it, an idle worker's asking would be a cycle. */
#define WANTS(w) ((WAITS(0) || WAITS(1) \
    || UNKNOWN(w, 0) || UNKNOWN(w, 1)) \
    /* workers are alike: the first to claim is called 0 */ \
    && (w == 0 || issued[0] + issued[1] > 0))

/* What a worker does with one request that it holds. */
#define WORK(w, r) \
    :: atomic { alive[w] && MINE(w, r) != 0 && AT(w, r) + 1 < OUTPUTS -> \
        progress(r, MINE(w, r), ME(w), AT(w, r), SEEN(w, r)); \
        if :: answer == OK -> AT(w, r) = AT(w, r) + 1 :: else -> hear(w, r) fi } \
    :: atomic { alive[w] && MINE(w, r) != 0 && AT(w, r) != STOPPING \
            && (exec[r] != MINE(w, r) || cancel_wish[r] || overdue[r]) -> \
        renew(r, MINE(w, r), ME(w)); hear(w, r) } \
    :: atomic { alive[w] && MINE(w, r) != 0 && AT(w, r) == OUTPUTS - 1 -> \
        finish(r, MINE(w, r), ME(w), AT(w, r), SEEN(w, r)); \
        if :: answer == OK -> let_go(w, r) :: else -> hear(w, r) fi } \
    :: atomic { alive[w] && MINE(w, r) != 0 && AT(w, r) == STOPPING -> \
        cancel_running(r, MINE(w, r), ME(w)); let_go(w, r) } \
    :: atomic { alive[w] && MINE(w, r) != 0 && AT(w, r) != STOPPING && FAULT; \
        if :: fail(r, MINE(w, r), ME(w)) :: release(r, MINE(w, r), ME(w)) fi; let_go(w, r) } \
    :: atomic { alive[w] && MINE(w, r) != 0 && wire == NOTHING && FAULT; \
        if \
        :: AT(w, r) + 1 < OUTPUTS -> post(PROGRESS, w, r) \
        :: AT(w, r) == OUTPUTS - 1 -> post(FINISH, w, r) \
        :: AT(w, r) == STOPPING -> post(CONFIRM, w, r) \
        :: AT(w, r) != STOPPING -> post(FAIL, w, r) \
        :: AT(w, r) != STOPPING -> post(RELEASE, w, r) \
        fi }

proctype worker(byte w) {
end:
    do
    WORK(w, 0)
    WORK(w, 1)
    /* claim.lua; what heartbeat.lua answers to an incarnation that was declared dead is the same news. */
    :: atomic { alive[w] && (reaped[ME(w)] -> FREE_LIFE(w) : WANTS(w)) ->
        known[0] = MINE(w, 0) != 0;
        known[1] = MINE(w, 1) != 0;
        claim(ME(w));
        if
        :: answer == REAPED -> drop_all(w); new_incarnation(w)
        :: else -> receive(w)
        fi }
    :: atomic { alive[w] && wire == NOTHING && WANTS(w) && FAULT; post(CLAIM, w, 0) }
    /* It is killed, or leaves after it has handed back what it held. */
    :: atomic { alive[w] && FAULT; alive[w] = 0; drop_all(w) }
    :: atomic { !alive[w] && FREE_LIFE(w) -> new_incarnation(w) }
    od
}

#define SWEEP(i) \
    :: atomic { calm && beat[i] && GONE(i) -> reap_incarnation(i) } \
    :: atomic { calm && beat[i] && !GONE(i) && FAULT; reap_incarnation(i) } \
    IMPATIENT(i)
#ifdef BROKEN_PULSE
/* Right after an outage every heartbeat is old. */
#define IMPATIENT(i) :: atomic { !calm && beat[i] -> NEEDED(i); reap_incarnation(i) }
#else
#define IMPATIENT(i)
#endif

#ifdef BROKEN_REAP
/* Looks first, acts later, and does not look again. */
#define LEASES(r) \
    :: atomic { view == 0 && calm && lease[r] && GONE(holder[r]) -> view = r + 1 } \
    :: atomic { view == r + 1 && lease[r] -> NEEDED(holder[r]); reap_lease(r); view = 0 } \
    :: atomic { view == r + 1 && !lease[r] -> view = 0 }
#else
#define LEASES(r) \
    :: atomic { calm && lease[r] && RUNS(r) && GONE(holder[r]) -> reap_lease(r) } \
    :: atomic { calm && lease[r] && RUNS(r) && !GONE(holder[r]) && FAULT; reap_lease(r) }
#endif

#define DUE(r) \
    :: atomic { retry[r] || (overdue[r] && status[r] == QUEUED) -> promote(r) }

proctype reaper() {
#ifdef BROKEN_REAP
    byte view;
#endif
end:
    do
    SWEEP(0)
    SWEEP(1)
    SWEEP(2)
    SWEEP(3)
#if LIVES > 2
    SWEEP(4)
    SWEEP(5)
#endif
#if LIVES > 3
    SWEEP(6)
    SWEEP(7)
#endif
    LEASES(0)
    LEASES(1)
#ifdef REUSE
    /* Nobody holds it: its job was deleted while it ran. */
    :: atomic { calm && lease[0] && !RUNS(0) -> lease[0] = 0 }
#endif
    DUE(0)
    DUE(1)
    od
}

/* It saw its worker end: good at any time, also while the clocks say nothing, also after a sweep was first. */
#define EVIDENCE(i) \
    :: atomic { GONE(i) && !calm && (beat[i] || HELD(i, 0) != 0 || HELD(i, 1) != 0) -> reap_incarnation(i) }

proctype guardians() {
end:
    do
    EVIDENCE(0)
    EVIDENCE(1)
    EVIDENCE(2)
    EVIDENCE(3)
#if LIVES > 2
    EVIDENCE(4)
    EVIDENCE(5)
#endif
#if LIVES > 3
    EVIDENCE(6)
    EVIDENCE(7)
#endif
    od
}

#define QUIET wire = NOTHING; wire_i = 0; wire_r = 0; wire_e = 0; wire_at = 0; wire_seen = 0; wire_known[0] = 0; wire_known[1] = 0

/* The call that was given up arrives; nobody hears the answer. */
proctype network() {
end:
    do
    :: atomic { wire == CLAIM ->
        known[0] = wire_known[0];
        known[1] = wire_known[1];
        claim(wire_i);
        given[0] = 0; given[1] = 0;
        QUIET }
    :: atomic { wire == PROGRESS -> progress(wire_r, wire_e, wire_i, wire_at, wire_seen); QUIET }
    :: atomic { wire == FINISH -> finish(wire_r, wire_e, wire_i, wire_at, wire_seen); QUIET }
    :: atomic { wire == FAIL -> fail(wire_r, wire_e, wire_i); QUIET }
    :: atomic { wire == RELEASE -> release(wire_r, wire_e, wire_i); QUIET }
    :: atomic { wire == CONFIRM -> cancel_running(wire_r, wire_e, wire_i); QUIET }
    od
}

proctype producer() {
    atomic { enqueue(0) };
    atomic { enqueue(1) };
end:
    atomic { FAULT; enqueue(1) }        /* the reply was lost */
}

#define PEOPLE(r) \
    :: atomic { status[r] != CREATED && (!ENDED(r) || AGAIN(r)) && !cancel_wish[r] && FAULT; cancel(r) } \
    :: atomic { status[r] != CREATED && !ENDED(r) && !overdue[r] && FAULT; overdue[r] = 1 } \
    /* expire.lua, or a claim that finds the checkpoint too old */ \
    :: atomic { (status[r] == QUEUED || status[r] == SCHEDULED) && have[r] > 0 && FAULT; restart(r) }

#ifdef ROLLBACK
/* The server dies and comes back with what its last fsync has. A script's writes stand in the log as one
   transaction: all of them or none. The counts of ends go back too: each history of the store has its own. */
byte saved;
byte o_status[REQUESTS], o_exec[REQUESTS], o_holder[REQUESTS], o_last_e[REQUESTS], o_have[REQUESTS], o_epoch[REQUESTS];
byte o_ends[REQUESTS], o_held[INCARNATIONS * REQUESTS];
bit  o_queue[REQUESTS], o_retry[REQUESTS], o_lease[REQUESTS], o_cancel[REQUESTS], o_overdue[REQUESTS];
bit  o_beat[INCARNATIONS], o_reaped[INCARNATIONS];

#define MOVE_ONE(to, from, j) to[j] = from[j]; from[j] = 0

inline save() {
    n = 0;
    do
    :: n < REQUESTS ->
        o_status[n] = status[n]; o_exec[n] = exec[n]; o_holder[n] = holder[n]; o_last_e[n] = last_e[n];
        o_have[n] = have[n]; o_epoch[n] = epoch[n]; o_ends[n] = ends[n]; o_queue[n] = queue[n];
        o_retry[n] = retry[n]; o_lease[n] = lease[n]; o_cancel[n] = cancel_wish[n]; o_overdue[n] = overdue[n];
        n++
    :: n == REQUESTS -> break
    od;
    n = 0;
    do
    :: n < INCARNATIONS ->
        o_beat[n] = beat[n]; o_reaped[n] = reaped[n];
        o_held[n * REQUESTS] = held[n * REQUESTS]; o_held[n * REQUESTS + 1] = held[n * REQUESTS + 1];
        n++
    :: n == INCARNATIONS -> break
    od
}

inline restore() {
    n = 0;
    do
    :: n < REQUESTS ->
        MOVE_ONE(status, o_status, n); MOVE_ONE(exec, o_exec, n); MOVE_ONE(holder, o_holder, n);
        MOVE_ONE(last_e, o_last_e, n); MOVE_ONE(have, o_have, n); MOVE_ONE(epoch, o_epoch, n);
        MOVE_ONE(ends, o_ends, n); MOVE_ONE(queue, o_queue, n); MOVE_ONE(retry, o_retry, n);
        MOVE_ONE(lease, o_lease, n); MOVE_ONE(cancel_wish, o_cancel, n); MOVE_ONE(overdue, o_overdue, n);
        n++
    :: n == REQUESTS -> break
    od;
    n = 0;
    do
    :: n < INCARNATIONS ->
        MOVE_ONE(beat, o_beat, n); MOVE_ONE(reaped, o_reaped, n);
        k = n * REQUESTS;
        MOVE_ONE(held, o_held, k);
        k++;
        MOVE_ONE(held, o_held, k);
        n++
    :: n == INCARNATIONS -> break
    od;
    calm = 0
}
#endif

proctype others() {
end:
    do
    PEOPLE(0)
    PEOPLE(1)
#ifdef REUSE
    :: atomic { status[0] != CREATED && FAULT; delete(0) }
    :: atomic { deleted && !over -> deleted = 0; enqueue(0) }
    :: atomic { deleted && !over -> over = 1 }
    :: atomic { (RUNS(0) || ENDED(0)) && !again[0] && FAULT; enqueue_again(0) }
#endif
    :: atomic { calm && FAULT; calm = 0 }
    :: atomic { !calm -> calm = 1 }     /* a heartbeat timeout has passed; whoever lives has beaten */
#ifdef ROLLBACK
    :: atomic { !saved && status[1] != CREATED -> saved = 1; save() }
    :: atomic { saved == 1 -> saved = 2; restore() }
#endif
    od
}

/* Nothing can happen any more: then each request has ended, and nothing is left behind. */
proctype end_of_all() {
    timeout -> atomic {
        n = 0;
        do
        :: n < REQUESTS ->
#ifdef REUSE
            assert(ENDED(n) && ends[n] == 1 || n == 0 && over && status[n] == CREATED);
            assert(!owed[n]);
#else
            assert(ENDED(n) && ends[n] == 1);
#endif
            assert(!queue[n] && !retry[n] && !lease[n] && exec[n] == 0 && !cancel_wish[n]);
            k = 0;
            do
            :: k < INCARNATIONS -> assert(HELD(k, n) == 0); k++
            :: k == INCARNATIONS -> break
            od;
            n++
        :: n == REQUESTS -> break
        od }
}

init {
    atomic {
        alive[0] = 1;
        alive[1] = 1;
        run producer();
        run worker(0);
        run worker(1);
        run reaper();
        run reaper();
        run guardians();
        run network();
        run others();
        run end_of_all()
    }
}
