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
local incarnation, worker = arg(), arg()
local answers = {}
for _ = 1, tonumber(arg()) do
  local id, execution, offset, outputs, blob, result, seconds = arg(), arg(), arg(), arg(), arg(), arg(), arg()
  local name = KEY.job .. id
  local job = redis.call('HMGET', name, 'execution', 'last', 'origin', 'client', 'result_ttl')
  if job[1] ~= execution or execution == '' then
    if job[2] == execution .. ':finished' then
      answers[#answers + 1] = 'already'
    else
      answers[#answers + 1] = refuse(id, execution, incarnation, job[1], job[3])
    end
  else
    local point = redis.call('HMGET', KEY.checkpoint .. id, 'seq')
    local stored, have = store(id, tonumber(offset), tonumber(outputs), blob, number_of(point[1]), '0', '', '', '')
    if not stored then
      answers[#answers + 1] = 'gap ' .. int(have)
    else
      local queue, ttl = job[3], number_of(job[5], DAY)
      local started = redis.call('HGET', KEY.execution .. id .. ':' .. execution, 'created_at')
      detach(queue, id, execution, incarnation, worker)
      leave_registries(queue, id)
      redis.call('HSET', name, 'status', 'finished', 'ended_at', utc(), 'execution', '', 'last', execution .. ':finished')
      redis.call('HDEL', name, 'cancel')
      redis.call('ZADD', KEY.finished .. queue, leaves_at(ttl), id)
      add_result(id, '1', worker, execution, started, 'return_value', result)
      drop_checkpoint(id)
      share_ttl(id, ttl)
      count('finished', queue)
      if redis.call('EXISTS', KEY.worker .. worker) == 1 then
        add(KEY.worker .. worker, 'successful_job_count', 1)
        redis.pcall('HINCRBYFLOAT', KEY.worker .. worker, 'total_working_time', seconds)
      end
      hint(job[4], id, 'end')
      answers[#answers + 1] = 'ok'
    end
  end
end
show_state(worker, incarnation)
return answers
