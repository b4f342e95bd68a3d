-- End requests with their results; the last outputs are stored in the same step.
--
-- ARGV incarnation  of the worker process
-- ARGV worker       RQ worker name
-- EACH request: id           request id
-- EACH request: execution    the caller's execution
-- EACH request: offset       outputs that are stored before these
-- EACH request: outputs      how many outputs are in blob; 0 for none
-- EACH request: blob         one packed entry of the output log
-- EACH request: result       as RQ's result stream holds it; '' for None
-- EACH request: seconds      how long the execution took
--
-- Returns  per request 'ok', 'already' (this execution finished it before: a reply was lost), 'lost', or
--          'gap <n>' (n outputs are stored, fewer than offset: nothing was done)
--
-- A finish wins over a cancel that the worker has not acted upon: the answer is there.
--
-- What registries and indexes forget of them is one call for each key, not for each request: half of what
-- a finish costs. If the script stopped before, a request would have ended all the same: its hash says so, and
-- whoever meets a trace of the execution removes it.

--- @include lib/basics/arguments
--- @include lib/basics/counters
--- @include lib/basics/never_refused
--- @include lib/basics/numbers
--- @include lib/basics/stamps
--- @include lib/basics/time
--- @include lib/checkpoint/hint
--- @include lib/checkpoint/store
--- @include lib/ending/mark_ended
--- @include lib/lease/owns
--- @include lib/lease/refuse
--- @include lib/queue/forget
--- @include lib/rq/registries
--- @include lib/rq/results
--- @include lib/rq/retention
--- @include lib/rq/worker_state

never_refused()

local incarnation, worker = arg(), arg()
local answers, ended, worked = {}, 0, 0
local queues, ids_of, done, marks = {}, {}, {}, {}
local held, gone, traces = {}, {}, {}

for _ = 1, tonumber(arg()) do
  local id, execution, offset, outputs, blob, result, seconds = arg(), arg(), arg(), arg(), arg(), arg(), arg()
  offset, outputs = tonumber(offset), tonumber(outputs)
  local name = KEY.job .. id
  local job = redis.call('HMGET', name, 'execution', 'last', 'origin', 'client', 'result_ttl', 'claimed', 'cancel',
    'rate_limit_key', 'success_callback_name', 'webhooks', 'started_at')
  if not owns(id, execution, job[1], job[11]) then
    if job[2] == execution .. ':finished' then
      answers[#answers + 1] = 'already'
    else
      answers[#answers + 1] = refuse(id, execution, incarnation, job[3] or nil)
    end
  else
    -- Most requests leave nothing but their job and their result: one question for all that there may be besides.
    local bare = redis.call('EXISTS', KEY.checkpoint .. id, KEY.output .. id, KEY.history .. id,
      name .. ':dependents') == 0
    local point = bare and {} or redis.call('HMGET', KEY.checkpoint .. id, 'seq', 'chunks', 'writing', 'offset')
    local fresh = not (point[1] or point[2] or point[3])
    local stored, have = 0, 0
    if not fresh or offset > 0 or outputs > 0 then
      local new = { offset = offset, outputs = outputs, blob = blob, seq = number_of(point[1]) }
      stored, have = store(id, { point[4], point[1] }, new)
    end
    if not stored then
      answers[#answers + 1] = 'gap ' .. int(have)
    else
      local queue, ttl, composite = job[3], number_of(job[5], DAY), id .. ':' .. execution
      mark_ended(id, execution, 'finished')
      if job[7] then redis.call('HDEL', name, 'cancel') end
      add_result(id, '1', worker, execution, seconds_of(job[6]), 'return_value', result)
      if not fresh then drop_checkpoint(id) end
      -- Most have nobody to be told either.
      if job[8] or (job[9] or '') ~= '' or (job[10] or '') ~= ''
        or not bare and redis.call('EXISTS', name .. ':dependents') == 1 then
        share_ttl(id, ttl)
      else
        remember(id, ttl)
        expire(name, ttl)
        expire(KEY.results .. id, ttl)
        if not bare then expire(KEY.history .. id, ttl) end
        if stored > 0 then expire(KEY.output .. id, ttl) end
      end
      hint(job[4], id, 'end')
      if not ids_of[queue] then
        queues[#queues + 1] = queue
        ids_of[queue], done[queue], marks[queue] = {}, {}, {}
      end
      local ids, scores = ids_of[queue], done[queue]
      ids[#ids + 1] = id
      scores[#scores + 1], scores[#scores + 2] = leaves_at(ttl), id
      marks[queue][#ids] = composite
      ended, worked = ended + 1, worked + (tonumber(seconds) or 0)
      held[ended], traces[ended] = id, composite
      gone[2 * ended - 1], gone[2 * ended] = KEY.execution .. composite, KEY.executions .. id
      answers[#answers + 1] = 'ok'
    end
  end
end
for _, queue in ipairs(queues) do
  leave_registries(queue, unpack(ids_of[queue]))
  redis.call('ZREM', KEY.leases .. queue, unpack(ids_of[queue]))
  redis.call('ZREM', KEY.wip .. queue, unpack(marks[queue]))
  redis.call('ZADD', KEY.finished .. queue, unpack(done[queue]))
  count('finished', queue, #ids_of[queue])
end
if ended > 0 then
  redis.call('HDEL', KEY.held .. incarnation, unpack(held))
  redis.call('SREM', KEY.worker .. worker .. ':executions', unpack(traces))
  redis.call('DEL', unpack(gone))
  if redis.call('EXISTS', KEY.worker .. worker) == 1 then
    add(KEY.worker .. worker, 'successful_job_count', ended)
    redis.pcall('HINCRBYFLOAT', KEY.worker .. worker, 'total_working_time', string.format('%.6f', worked))
  end
end
show_state(worker, incarnation)
return answers
