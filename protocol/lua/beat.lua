-- Say that a worker process lives, and that nothing has changed since its last heartbeat.
--
-- ARGV incarnation  of the worker process
-- ARGV timeout_ms   ms until it counts as dead without another heartbeat
-- ARGV due_ms       a sweep is due when the reapers' pulse is older than so many ms
--
-- Returns  'ok', or 'whole' if heartbeat.lua is to follow: it was declared dead, or Redis has lost what it knew of it,
--          or a sweep is due that nobody was asked for
--
-- A thousand workers send one each second: so it does no more than this.

--- @include lib/basics/arguments
--- @include lib/basics/never_refused
--- @include lib/basics/numbers
--- @include lib/basics/time

never_refused()

local incarnation, timeout_ms, due_ms = arg(), arg(), arg()
-- The dead are not in the index. (Twice in one millisecond is no change either.)
local known = redis.call('ZADD', KEY.beats, 'XX', 'CH', int(now_ms + tonumber(timeout_ms)), incarnation) == 1
if not known then return 'whole' end
local row = redis.call('HMGET', KEY.pulse, 'at', 'asked_until')
local at = number_of(row[1])
local due = at > now_ms or now_ms - at > tonumber(due_ms)
return due and now_ms >= number_of(row[2]) and 'whole' or 'ok'
